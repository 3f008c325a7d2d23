"""Demonstrations: episodes, readers and writers, training windows, statistics.

Names are imported when they are first used, so that importing this package loads neither pyarrow
nor PyAV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmgym.data.episodes import Dataset, DatasetError, Episode, EpisodeInfo
    from wmgym.data.frame_cache import FrameCache
    from wmgym.data.lerobot import LeRobotDataset, LeRobotKeys
    from wmgym.data.lerobot_subset import subset
    from wmgym.data.lerobot_writer import assemble, stage_episode, staged_info, staged_names
    from wmgym.data.statistics import Statistics, normalize_q99, unnormalize_q99
    from wmgym.data.windows import WindowSampler

_HOMES = {
    "Dataset": "episodes",
    "DatasetError": "episodes",
    "Episode": "episodes",
    "EpisodeInfo": "episodes",
    "FrameCache": "frame_cache",
    "LeRobotDataset": "lerobot",
    "LeRobotKeys": "lerobot",
    "Statistics": "statistics",
    "WindowSampler": "windows",
    "assemble": "lerobot_writer",
    "normalize_q99": "statistics",
    "stage_episode": "lerobot_writer",
    "staged_info": "lerobot_writer",
    "staged_names": "lerobot_writer",
    "subset": "lerobot_subset",
    "unnormalize_q99": "statistics",
}

__all__ = [
    "Dataset",
    "DatasetError",
    "Episode",
    "EpisodeInfo",
    "FrameCache",
    "LeRobotDataset",
    "LeRobotKeys",
    "Statistics",
    "WindowSampler",
    "assemble",
    "normalize_q99",
    "stage_episode",
    "staged_info",
    "staged_names",
    "subset",
    "unnormalize_q99",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
