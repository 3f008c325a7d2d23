"""Names, paths and table layouts of LeRobot v3.0, shared by the reader and the writer.

A dataset is a folder: `meta/info.json` (features, path templates), `meta/tasks.parquet`
(instruction to number), `meta/episodes/*/*.parquet` (one row per episode: length, which data and
video file, from which time), `meta/stats.json`, `data/*/*.parquet` (one row per step) and
`videos/<key>/*/*.mp4`, many episodes to a file.

Ours adds columns to the episode table: `suite`, `task_id`, `init_state_id`, `seed`, `success`,
`sim_state_size` and `extra` (JSON). Simulator states differ in length between tasks while LeRobot
casts a feature to lists of one length, so `sim_state` is padded with NaN and `sim_state_size` says
how much of it counts.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODEBASE_VERSION = "v3.0"
CHUNKS_SIZE = 1000
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

IMAGE = "observation.images.image"
WRIST_IMAGE = "observation.images.wrist_image"
STATE = "observation.state"
ACTION = "action"
CLEAN_ACTION = "action.clean"
SIM_STATE = "sim_state"
DONE = "next.done"

STATE_NAMES = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper1", "gripper2"]
ACTION_NAMES = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"]

BOOKKEEPING: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""Features of every LeRobot dataset that follow from an episode's place in it."""


def file_numbers(index: int) -> dict[str, int]:
    """`chunk_index` and `file_index` of the `index`-th file."""
    return {"chunk_index": index // CHUNKS_SIZE, "file_index": index % CHUNKS_SIZE}


def vector_feature(dtype: str, size: int, names: list[str] | None) -> dict[str, Any]:
    """The entry in info.json of a vector of `size` entries; names are kept if their number fits."""
    fits = names is not None and len(names) == size
    return {"dtype": dtype, "shape": [size], "names": names if fits else None}


def video_feature(frames: NDArray[np.uint8], fps: int) -> dict[str, Any]:
    """The entry in info.json of a camera whose frames `(N, H, W, 3)` are stored as H.264."""
    height, width = frames.shape[1:3]
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }


def tasks_metadata() -> dict[bytes, bytes]:
    """Parquet schema metadata by which pandas takes the column `task` for the table's index."""
    column_index = _pandas_column(None, "unicode", "object") | {"metadata": {"encoding": "UTF-8"}}
    document = {
        "index_columns": ["task"],
        "column_indexes": [column_index],
        "columns": [
            _pandas_column("task_index", "int64", "int64"),
            _pandas_column("task", "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": "15.0.0"},
        "pandas_version": "2.0.0",
    }
    return {b"pandas": json.dumps(document).encode()}


def _pandas_column(name: str | None, pandas_type: str, numpy_type: str) -> dict[str, Any]:
    return {
        "name": name,
        "field_name": name,
        "pandas_type": pandas_type,
        "numpy_type": numpy_type,
        "metadata": None,
    }
