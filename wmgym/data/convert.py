"""Turns a dataset of one format into the other: RLDS to LeRobot v3, or back.

Actions, proprioception and instructions stay the same bit for bit. Pictures are coded anew, with a
loss: as H.264 in LeRobot (`wmgym.data.video`), as JPEG in RLDS (`wmgym.data.rlds_writer`). To RLDS,
simulator states (but for the robot's joints), meant actions and extras are lost; to LeRobot, the
joint state. Both ways go on where they were interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from wmgym.data.episodes import StoredDataset
from wmgym.data.lerobot import LeRobotDataset
from wmgym.data.lerobot_writer import assemble, stage_episode, staged_names
from wmgym.data.opening import open_dataset
from wmgym.data.rlds_writer import write_rlds
from wmgym.files import check_own, write_text
from wmgym.spaces import CONTROL_HZ

_SOURCE = "source.json"


def convert_dataset(
    data: str | os.PathLike[str],
    out_dir: str | Path,
    *,
    wrist: bool = True,
    quality: int = 95,
    progress: bool = True,
) -> Path:
    """Converts the dataset in a folder to the other format.

    Args:
        data: Folder of a LeRobot v3 or RLDS dataset.
        out_dir: Folder of the new one, which must not exist.
        wrist: Whether the wrist camera is kept, where there is one.
        quality: Quality of JPEGs in RLDS, 1 to 100.
        progress: Whether a progress bar is shown.

    Returns:
        `out_dir`.

    Raises:
        DatasetError: `data` holds no dataset, or a damaged one.
        FileExistsError: `out_dir` exists, or where it is prepared something else lies.
        ValueError: What the new format cannot hold: a bad name of `out_dir`, pictures of odd size.
    """
    dataset = open_dataset(data)
    wrist = wrist and dataset.has_wrist
    if isinstance(dataset, LeRobotDataset):
        return write_rlds(dataset, out_dir, wrist=wrist, quality=quality, progress=progress)
    return to_lerobot(dataset, out_dir, wrist=wrist, progress=progress)


def to_lerobot(
    dataset: StoredDataset, out_dir: str | Path, *, wrist: bool = False, progress: bool = True
) -> Path:
    """Writes all episodes of a dataset, in their order, as a LeRobot v3 dataset at 20 Hz.

    Episodes are staged in `<out_dir>.staging`, where a later call finds those of an interrupted
    one, and which is removed at the end.

    Args:
        dataset: The demonstrations.
        out_dir: Folder of the new dataset, which must not exist.
        wrist: Whether the wrist camera is kept.
        progress: Whether a progress bar is shown.

    Returns:
        `out_dir`.

    Raises:
        FileExistsError: `out_dir` exists, or its staging area holds something else.
        ValueError: No episodes, pictures of odd size, or episodes that differ in size.
        DatasetError: The dataset's files are damaged.
    """
    from tqdm import tqdm

    out = Path(out_dir)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    staging = out.with_name(f"{out.name}.staging")
    done = _staged(staging, dataset, wrist)
    names = [f"episode-{info.episode_id:06d}" for info in dataset.episodes]
    pairs = zip(names, dataset.episodes, strict=True)
    for name, info in tqdm(pairs, f"writing {out.name}", len(names), disable=not progress):
        if name not in done:
            episode = dataset.read(info.episode_id, wrist=wrist)
            stage_episode(staging, name, episode, fps=CONTROL_HZ)
    assemble(staging, out, names, fps=CONTROL_HZ)
    shutil.rmtree(staging)
    return out


def _staged(staging: Path, dataset: StoredDataset, wrist: bool) -> set[str]:
    """Names of the episodes in the staging area, all of which are of this dataset."""
    source = staging / _SOURCE
    mine = {"data": dataset.fingerprint(), "wrist": wrist}
    check_own(staging, _SOURCE)
    names = set(staged_names(staging))
    if not names:
        staging.mkdir(parents=True, exist_ok=True)
        write_text(source, json.dumps(mine))
    elif json.loads(source.read_text()) != mine:
        raise FileExistsError(
            f"{staging} is the staging area of something else; remove it or choose another folder"
        )
    return names
