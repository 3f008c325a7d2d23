"""Opens a dataset in a folder, whichever of the two formats it has."""

from __future__ import annotations

import os
from pathlib import Path

from wmgym.data import lerobot_format, rlds_format
from wmgym.data.episodes import DatasetError, StoredDataset
from wmgym.data.lerobot import LeRobotDataset
from wmgym.data.rlds import RLDSDataset


def open_dataset(folder: str | os.PathLike[str]) -> StoredDataset:
    """Opens a LeRobot v3 dataset, or an RLDS dataset or one of its versions.

    Raises:
        DatasetError: The folder holds neither, several versions, or a damaged dataset.
    """
    index = index_file(folder)
    if index.name == rlds_format.INFO_PATH:
        return RLDSDataset(index.parent)
    return LeRobotDataset(Path(folder))


def index_file(folder: str | os.PathLike[str]) -> Path:
    """The file that describes the dataset in a folder, and by whose name its format is known.

    Raises:
        DatasetError: The folder holds no dataset, or several versions of one.
    """
    root = Path(folder)
    lerobot, rlds = root / lerobot_format.INFO_PATH, rlds_format.INFO_PATH
    if lerobot.is_file():
        return lerobot
    if (root / rlds).is_file() or any(root.glob(f"*/{rlds}")):
        return rlds_format.version_folder(root) / rlds
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; expected one of a LeRobot v3 or RLDS dataset")
    inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise DatasetError(
        f"{root} is no dataset: expected {lerobot_format.INFO_PATH} (LeRobot v3), or {rlds} in it "
        f"or in a folder of it (RLDS); it holds {inside}"
    )
