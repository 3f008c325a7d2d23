"""Demonstrations: episodes, readers and writers, training windows, statistics.

Importing this package loads neither pyarrow nor PyAV: its modules import them when they are used.
"""

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
from wmgym.data.lerobot_writer import assemble, stage_episode, staged_names
from wmgym.data.opening import open_dataset
from wmgym.data.rlds import RLDSDataset
from wmgym.data.rlds_writer import write_rlds
from wmgym.data.statistics import Statistics
from wmgym.data.windows import WindowSampler

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
    "open_dataset",
    "stage_episode",
    "staged_names",
    "subset",
    "to_lerobot",
    "write_rlds",
]
