"""A small dataset in the specification of the modified LIBERO data, made without the package.

Everything is called and stored as in `libero_object_no_noops/1.0.0`: two cameras of 256 x 256 JPEGs
turned by 180 degrees, shards called after the builder and not after the folder, some with packed
numbers and some without.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from coded_episodes import WRIST_OFFSET, coded_frames
from PIL import Image
from slow_tfrecord import example, record

NAME = "libero_object"
LENGTHS = (13, 9, 12, 10, 11, 9, 10, 12, 9, 11)
SHARDS = ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))
INSTRUCTIONS = [
    f"pick up the {thing} and place it in the basket"
    for thing in ("milk", "butter", "alphabet soup")
]
TASKS = (7, 6, 0)


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def frames(number: int, length: int, offset: int = 0) -> np.ndarray:
    """Frames `(N, 256, 256, 3)` that carry their own number."""
    small = coded_frames(100 * number + offset + np.arange(length))
    return small.repeat(4, 1).repeat(4, 2)


def features(number: int, length: int) -> dict[str, tuple[str, list]]:
    rng = np.random.default_rng([11, number])

    def vectors(size: int) -> list[float]:
        return rng.uniform(-0.9, 0.9, length * size).astype(np.float32).tolist()

    actions = np.array(vectors(7), np.float32).reshape(length, 7)
    actions[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
    ends = [0] * (length - 1) + [1]
    return {
        "steps/is_last": ("ints", ends),
        "steps/observation/wrist_image": (
            "bytes",
            [jpeg(frame) for frame in frames(number, length, WRIST_OFFSET)],
        ),
        "steps/discount": ("floats", [1.0] * length),
        "steps/reward": ("floats", [float(end) for end in ends]),
        "steps/observation/image": ("bytes", [jpeg(frame) for frame in frames(number, length)]),
        "steps/language_instruction": (
            "bytes",
            [INSTRUCTIONS[number % 3].encode()] * length,
        ),
        "steps/is_first": ("ints", [1] + [0] * (length - 1)),
        "steps/observation/state": ("floats", vectors(8)),
        "episode_metadata/file_path": ("bytes", [f"/data/demo_{number}.hdf5".encode()]),
        "steps/observation/joint_state": ("floats", vectors(7)),
        "steps/action": ("floats", actions.ravel().tolist()),
        "steps/is_terminal": ("ints", ends),
    }


def shard_path(folder: Path, index: int, *, name: str = NAME) -> Path:
    return folder / f"{name}-train.tfrecord-{index:05d}-of-{len(SHARDS):05d}"


def write(folder: Path, *, name: str = NAME, changes=lambda number, given: given) -> Path:
    """Writes the dataset into a version folder.

    Args:
        folder: The version folder.
        name: The builder's name.
        changes: Alters the features of an episode.
    """
    folder.mkdir(parents=True)
    for index, numbers in enumerate(SHARDS):
        records = [
            record(example(changes(n, features(n, LENGTHS[n])), packed=n % 2 == 0)) for n in numbers
        ]
        shard_path(folder, index, name=name).write_bytes(b"".join(records))
    split = {
        "name": "train",
        "shardLengths": [str(len(numbers)) for numbers in SHARDS],
        "numBytes": "0",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    document = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(document))
    return folder
