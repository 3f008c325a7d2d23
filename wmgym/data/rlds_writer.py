"""Writes demonstrations as an RLDS dataset that TFDS reads, without TensorFlow.

The specification is that of the modified LIBERO data (`wmgym.data.rlds_format`), so that code made
for `libero_object_no_noops` reads ours: actions as they were executed, pictures turned by 180
degrees, `reward` 1 at the last step of a success. What the demonstrations lack is left out of
`features.json`, not filled with zeros: the wrist camera, and the joint state, which is taken from
the simulator state. Initial states and seeds go into `file_path`.

What is lost: pictures become JPEG (quality 95 and half the resolution of colour, as TFDS writes
them), 42 dB from what the shipped demonstrations show, 1.4 levels on average. The actions that the
expert meant, simulator states and other extras have no place.

Shards are written under temporary names, in a folder `<out>.part` that becomes `<out>` when it is
complete: a killed writer leaves no half dataset, and started again goes on after its last shard.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from wmgym.data import rlds_format as fmt
from wmgym.data import tf_example
from wmgym.data.episodes import DatasetError, Episode, EpisodeInfo, StoredDataset
from wmgym.data.tfrecord import OVERHEAD, index_records, write_record
from wmgym.files import check_own, write_text

_PROGRESS = "writing.json"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Layout:
    """What all episodes of a dataset have in common.

    Attributes:
        image: Shape `(H, W, 3)` of the third-person camera.
        wrist_image: Shape of the wrist camera, None without one.
        joint_state: Whether the simulator states tell the robot's joints.
    """

    image: tuple[int, ...]
    wrist_image: tuple[int, ...] | None
    joint_state: bool

    @classmethod
    def of(cls, episode: Episode) -> _Layout:
        wrist = episode.wrist_images
        return cls(
            image=episode.images.shape[1:],
            wrist_image=None if wrist is None else wrist.shape[1:],
            joint_state=joint_states(episode) is not None,
        )


def write_rlds(
    dataset: StoredDataset,
    out_dir: str | Path,
    *,
    wrist: bool = False,
    quality: int = 95,
    episodes_per_shard: int = 16,
    progress: bool = True,
) -> Path:
    """Writes all episodes of a dataset, in their order, as the split `train`.

    Args:
        dataset: The demonstrations.
        out_dir: Folder of the new dataset, which must not exist; its name is the dataset's name, as
            in `libero_object_no_noops`, and it holds one folder, the version.
        wrist: Whether the wrist camera is written.
        quality: Quality of the JPEGs, 1 to 100.
        episodes_per_shard: Most episodes in a shard.
        progress: Whether a progress bar is shown.

    Returns:
        `out_dir`.

    Raises:
        ValueError: A bad name or number, no episodes, or episodes that differ in cameras or sizes.
        FileExistsError: `out_dir` exists, or `<out_dir>.part` holds something else.
        DatasetError: The dataset's files are damaged.
        OSError: The disk is full, and the like; what was written counts when started again.
    """
    out = Path(out_dir)
    _check(dataset, out, quality, episodes_per_shard)
    part = out.with_name(f"{out.name}.part")
    folder = part / fmt.VERSION
    _begin(part, _fingerprint(dataset, (wrist, quality, episodes_per_shard)))
    folder.mkdir(exist_ok=True)
    plan = _plan(dataset.episodes, episodes_per_shard)
    layout = _Layout.of(dataset.read(plan[0][0].episode_id, 0, 1, wrist=wrist))
    sizes = _write_shards(folder, out.name, dataset, plan, layout, quality, progress)
    lengths = [len(infos) for infos in plan]
    features = fmt.features_document(
        layout.image, layout.wrist_image, joint_state=layout.joint_state
    )
    write_text(folder / fmt.FEATURES_PATH, json.dumps(features, indent=2))
    info = fmt.info_document(out.name, lengths, sum(sizes) - OVERHEAD * sum(lengths))
    write_text(folder / fmt.INFO_PATH, json.dumps(info, indent=2))
    part.replace(out)
    (out / _PROGRESS).unlink()
    return out


def joint_states(episode: Episode) -> NDArray[np.float32] | None:
    """Joint positions of the robot `(N, 7)`, rad, or None if the episode does not tell them.

    LIBERO's simulator states are `[time, qpos, qvel]`, and qpos begins with the robot's seven
    joints and the gripper's two. That a state is one of these is seen by the gripper, which
    proprioception repeats.
    """
    states = episode.sim_states
    if states is None or states.shape[1] < 1 + fmt.JOINTS + 2:
        return None
    gripper = states[:, 1 + fmt.JOINTS : 1 + fmt.JOINTS + 2]
    if not np.allclose(gripper, episode.proprio[:, 6:8], atol=_TOLERANCE):
        return None
    return states[:, 1 : 1 + fmt.JOINTS].astype(np.float32)


def encode_episode(episode: Episode, *, quality: int = 95) -> bytes:
    """A whole episode as the data of a record.

    Returns:
        An encoded tf.train.Example of the specification; without wrist images or joint state if the
        episode has none.
    """
    count, success = len(episode), episode.info.success
    last = np.arange(count) == count - 1
    features: dict[str, tf_example.Values] = {
        fmt.ACTION: episode.actions.ravel(),
        fmt.STATE: episode.proprio.ravel(),
        fmt.IMAGE: [_jpeg(image, quality) for image in episode.images],
        fmt.INSTRUCTION: [episode.info.instruction.encode()] * count,
        fmt.REWARD: (last & (success is True)).astype(np.float32),
        fmt.DISCOUNT: np.ones(count, np.float32),
        fmt.IS_FIRST: np.arange(count) == 0,
        fmt.IS_LAST: last,
        fmt.IS_TERMINAL: last & (success is not False),
        fmt.FILE_PATH: [fmt.file_path_of(episode.info).encode()],
    }
    if episode.wrist_images is not None:
        features[fmt.WRIST_IMAGE] = [_jpeg(image, quality) for image in episode.wrist_images]
    joints = joint_states(episode)
    if joints is not None:
        features[fmt.JOINT_STATE] = joints.ravel()
    return tf_example.encode(features)


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _check(dataset: StoredDataset, out: Path, quality: int, episodes_per_shard: int) -> None:
    if not re.fullmatch(r"[A-Za-z]\w*", out.name, re.ASCII):
        raise ValueError(
            f"{out}: the folder's name becomes the dataset's, for which TFDS allows letters, "
            "digits and underscores, a letter first; for example libero_object_no_noops"
        )
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality}: allowed are 1 to 100")
    if episodes_per_shard < 1:
        raise ValueError(f"episodes_per_shard={episodes_per_shard}: allowed are integers >= 1")
    if not dataset.episodes:
        raise ValueError("a dataset needs at least one episode, got none")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")


def _fingerprint(dataset: StoredDataset, options: tuple[object, ...]) -> str:
    parts = (options, dataset.episodes, dataset.fingerprint())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _begin(part: Path, fingerprint: str) -> None:
    """Keeps what an interrupted writer of the same data left in `part`, and nothing else."""
    check_own(part, _PROGRESS)
    progress = part / _PROGRESS
    if not progress.exists() or json.loads(progress.read_text()) != fingerprint:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_text(progress, json.dumps(fingerprint))


def _plan(episodes: list[EpisodeInfo], most: int) -> list[list[EpisodeInfo]]:
    """Episodes by shard, `most` in one, spread evenly."""
    shards = -(-len(episodes) // most)
    bounds = [len(episodes) * i // shards for i in range(shards + 1)]
    return [episodes[a:b] for a, b in itertools.pairwise(bounds)]


def _write_shards(
    folder: Path,
    name: str,
    dataset: StoredDataset,
    plan: list[list[EpisodeInfo]],
    layout: _Layout,
    quality: int,
    progress: bool,
) -> list[int]:
    """Writes the shards that are not there yet; returns the size of each in bytes."""
    from tqdm import tqdm

    paths = [
        folder / fmt.shard_name(fmt.SHARD_TEMPLATE, name, "train", i, len(plan))
        for i in range(len(plan))
    ]
    with tqdm(total=len(dataset.episodes), desc=f"writing {name}", disable=not progress) as bar:
        for path, infos in zip(paths, plan, strict=True):
            if _complete(path, len(infos)):
                bar.update(len(infos))
                continue
            with _new_file(path) as file:
                for info in infos:
                    episode = dataset.read(info.episode_id, wrist=layout.wrist_image is not None)
                    _check_layout(info, layout, _Layout.of(episode))
                    write_record(file, encode_episode(episode, quality=quality))
                    bar.update()
    return [path.stat().st_size for path in paths]


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is complete."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{error.strerror or error}; complete shards are kept, start again to go on"
        raise OSError(error.errno, reason, str(path)) from error


def _complete(path: Path, count: int) -> bool:
    """Whether a shard is there with all its records."""
    try:
        return len(index_records(path)) == count
    except DatasetError:
        return False


def _check_layout(info: EpisodeInfo, expected: _Layout, found: _Layout) -> None:
    if found != expected:
        raise ValueError(
            f"episode {info.episode_id} has {found}, those before it {expected}; all episodes of a "
            "dataset must have the same pictures and joint states"
        )
