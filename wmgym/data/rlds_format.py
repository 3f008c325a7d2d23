"""Names, paths and documents of RLDS datasets as TFDS stores them, shared by reader and writer.

A dataset is a folder `<name>/<version>` with `dataset_info.json` (splits, records in each shard,
how shards are called), `features.json` (what a record holds) and TFRecord shards. A record is an
episode: a tf.train.Example whose lists under `steps/...` hold the values of all steps end to end.

The specification is that of the modified LIBERO data (`libero_{spatial,object,goal,10}_no_noops`).
It has no place for LIBERO's initial state, on which episodes are held out, nor for the task's
index: `episode_metadata/file_path`, which anybody may fill, holds them in what is written here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmgym.data.episodes import DatasetError, EpisodeInfo
from wmgym.spaces import SUITES

INFO_PATH = "dataset_info.json"
FEATURES_PATH = "features.json"
VERSION = "1.0.0"
SHARD_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

ACTION = "steps/action"
STATE = "steps/observation/state"
JOINT_STATE = "steps/observation/joint_state"
IMAGE = "steps/observation/image"
WRIST_IMAGE = "steps/observation/wrist_image"
INSTRUCTION = "steps/language_instruction"
REWARD = "steps/reward"
DISCOUNT = "steps/discount"
IS_FIRST = "steps/is_first"
IS_LAST = "steps/is_last"
IS_TERMINAL = "steps/is_terminal"
FILE_PATH = "episode_metadata/file_path"

JOINTS = 7
"""Entries of the joint state: the robot's joint positions, rad."""

_PYTHON = "tensorflow_datasets.core.features."
_ORIGIN = re.compile(r"(\w*)/task_(-?\d+)/init_state_(-?\d+)/seed_(-?\d+)")


def version_folder(root: Path) -> Path:
    """The folder with `dataset_info.json`: `root`, or the only one of its subfolders that has it.

    Raises:
        DatasetError: There is none, or several.
    """
    if (root / INFO_PATH).is_file():
        return root
    found = sorted(path.parent for path in root.glob(f"*/{INFO_PATH}"))
    if len(found) == 1:
        return found[0]
    if found:
        versions = ", ".join(folder.name for folder in found)
        raise DatasetError(f"{root} holds the versions {versions}; give one of these folders")
    raise DatasetError(
        f"{root} is no RLDS dataset: neither it nor a folder in it holds {INFO_PATH}"
    )


def shard_name(template: str, dataset: str, split: str, index: int, count: int) -> str:
    """File name of a shard.

    Raises:
        KeyError: The template names something else.
    """
    return template.format(
        DATASET=dataset,
        SPLIT=split,
        FILEFORMAT="tfrecord",
        SHARD_INDEX=f"{index:05d}",
        NUM_SHARDS=f"{count:05d}",
        SHARD_X_OF_Y=f"{index:05d}-of-{count:05d}",
    )


def suite_of(names: Sequence[str]) -> str:
    """The LIBERO suite that one of a dataset's names tells, `""` if none does.

    Underscores don't count: the published shards of libero_10 are called `liber_o10`.
    """
    plain = {suite.replace("_", ""): suite for suite in SUITES}
    found = (plain.get(n.lower().removesuffix("_no_noops").replace("_", "")) for n in names)
    return next((suite for suite in found if suite), "")


def file_path_of(info: EpisodeInfo) -> str:
    """What an episode's `file_path` says: the one it came with, else where it comes from."""
    given = info.extra.get("file_path")
    origin = f"{info.suite}/task_{info.task_id}/init_state_{info.init_state_id}/seed_{info.seed}"
    return origin if given is None else str(given)


def origin_of(file_path: str) -> tuple[str, int, int, int] | None:
    """Suite, task id, initial state and seed of a `file_path` written here, else None."""
    match = _ORIGIN.fullmatch(file_path)
    if match is None:
        return None
    task_id, init_state_id, seed = map(int, match.groups()[1:])
    return match[1], task_id, init_state_id, seed


def info_document(name: str, shard_lengths: Sequence[int], num_bytes: int) -> dict[str, Any]:
    """The content of dataset_info.json for a dataset with the split `train`."""
    split = {
        "filepathTemplate": SHARD_TEMPLATE,
        "name": "train",
        "numBytes": str(num_bytes),
        "shardLengths": [str(length) for length in shard_lengths],
    }
    return {"fileFormat": "tfrecord", "name": name, "splits": [split], "version": VERSION}


def features_document(
    image: Sequence[int], wrist_image: Sequence[int] | None, *, joint_state: bool
) -> dict[str, Any]:
    """The content of features.json.

    Args:
        image: Shape `(H, W, 3)` of the third-person camera.
        wrist_image: Shape of the wrist camera, None without one.
        joint_state: Whether there is a joint state.
    """
    observation = {"image": _image(image, "Third-person camera, turned by 180 degrees.")}
    if wrist_image is not None:
        observation["wrist_image"] = _image(wrist_image, "Wrist camera.")
    observation["state"] = _vector(
        8, "End effector: position (3, m), axis-angle (3, rad); gripper joints (2, m)."
    )
    if joint_state:
        observation["joint_state"] = _vector(JOINTS, "Joint positions of the robot, rad.")
    steps = {
        "action": _vector(7, "Delta position (3), delta axis-angle (3), gripper (-1 opens)."),
        "discount": _scalar("float32", "1 at every step."),
        "is_first": _scalar("bool", "Whether the step is the first."),
        "is_last": _scalar("bool", "Whether the step is the last."),
        "is_terminal": _scalar("bool", "Whether the task's own end is reached."),
        "language_instruction": _text("Task in words."),
        "observation": _group(observation),
        "reward": _scalar("float32", "1 at the last step of a success, else 0."),
    }
    sequence = {
        "pythonClassName": _PYTHON + "dataset_feature.Dataset",
        "sequence": {"feature": _group(steps), "length": "-1"},
    }
    metadata = _group({"file_path": _text("Where the episode comes from.")})
    return _group({"episode_metadata": metadata, "steps": sequence})


def _group(features: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": _PYTHON + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _image(shape: Sequence[int], description: str) -> dict[str, Any]:
    described = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": _shape(shape)}
    name = _PYTHON + "image_feature.Image"
    return {"pythonClassName": name, "description": description, "image": described}


def _vector(size: int, description: str) -> dict[str, Any]:
    return _tensor("tensor_feature.Tensor", "float32", [size], description)


def _scalar(dtype: str, description: str) -> dict[str, Any]:
    return _tensor("scalar.Scalar", dtype, [], description)


def _tensor(name: str, dtype: str, shape: Sequence[int], description: str) -> dict[str, Any]:
    tensor = {"dtype": dtype, "encoding": "none", "shape": _shape(shape)}
    return {"pythonClassName": _PYTHON + name, "description": description, "tensor": tensor}


def _text(description: str) -> dict[str, Any]:
    name = _PYTHON + "text_feature.Text"
    return {"pythonClassName": name, "description": description, "text": {}}


def _shape(shape: Sequence[int]) -> dict[str, list[str]]:
    return {"dimensions": [str(size) for size in shape]} if shape else {}
