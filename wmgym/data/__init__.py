"""Demonstrations: episodes, readers and writers, training windows, statistics.

Names are imported when they are first used, so that importing this package loads neither pyarrow
nor PyAV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmgym.data.convert import convert_dataset, to_lerobot
    from wmgym.data.episodes import (
        Dataset,
        DatasetError,
        Episode,
        EpisodeInfo,
        StoredDataset,
    )
    from wmgym.data.frame_cache import FrameCache
    from wmgym.data.lerobot import LeRobotDataset, LeRobotKeys
    from wmgym.data.lerobot_subset import subset
    from wmgym.data.lerobot_writer import assemble, stage_episode, staged_info, staged_names
    from wmgym.data.opening import open_dataset
    from wmgym.data.rlds import RLDSDataset
    from wmgym.data.rlds_writer import write_rlds
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
    "RLDSDataset": "rlds",
    "Statistics": "statistics",
    "StoredDataset": "episodes",
    "WindowSampler": "windows",
    "assemble": "lerobot_writer",
    "convert_dataset": "convert",
    "normalize_q99": "statistics",
    "open_dataset": "opening",
    "stage_episode": "lerobot_writer",
    "staged_info": "lerobot_writer",
    "staged_names": "lerobot_writer",
    "subset": "lerobot_subset",
    "to_lerobot": "convert",
    "unnormalize_q99": "statistics",
    "write_rlds": "rlds_writer",
}

__all__ = [
    "Dataset",
    "DatasetError",
    "Episode",
    "EpisodeInfo",
    "FrameCache",
    "LeRobotDataset",
    "LeRobotKeys",
    "RLDSDataset",
    "Statistics",
    "StoredDataset",
    "WindowSampler",
    "assemble",
    "convert_dataset",
    "normalize_q99",
    "open_dataset",
    "stage_episode",
    "staged_info",
    "staged_names",
    "subset",
    "to_lerobot",
    "unnormalize_q99",
    "write_rlds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
