"""Reads LeRobot v3.0 datasets, ours and public ones, without the lerobot package.

`LeRobotDataset` implements `wmgym.data.episodes.Dataset`. Its metadata is read at once; steps are
read on demand. A read seeks to the keyframe before its first frame, decodes up to its last, and
reads only the parquet row groups that hold its steps. Several episodes in one file and one file per
episode are the same to it. A bounded number of bytes of row groups stays in memory; no file stays
open, so an instance may be used by several threads, pickled, and used after a fork.

Which feature is which is told by `LeRobotKeys`, found by name in info.json when not given. Cameras
may be stored as video or as encoded images in the parquet files.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmgym.data import lerobot_format as fmt
from wmgym.data.episodes import DatasetError, Episode, EpisodeInfo, check_steps
from wmgym.data.lerobot_tables import StepTables, column_array, read_rows
from wmgym.data.video import Clip, decode

if TYPE_CHECKING:
    import pyarrow as pa

_CANDIDATES: dict[str, tuple[str, ...]] = {
    "image": (
        fmt.IMAGE,
        "observation.images.agentview",
        "observation.images.agentview_rgb",
        "observation.images.front",
        "observation.image",
        "image",
    ),
    "wrist_image": (
        fmt.WRIST_IMAGE,
        "observation.images.image2",
        "observation.images.wrist",
        "observation.images.eye_in_hand_rgb",
        "observation.wrist_image",
        "wrist_image",
    ),
    "proprio": (fmt.STATE, "state"),
    "action": (fmt.ACTION, "actions"),
    "clean_action": (fmt.CLEAN_ACTION,),
    "sim_state": (fmt.SIM_STATE,),
}
_REQUIRED = ("image", "proprio", "action")


@dataclass(frozen=True, kw_only=True)
class LeRobotKeys:
    """Names of a dataset's features.

    Attributes:
        image: Third-person camera.
        wrist_image: Wrist camera, None without one.
        proprio: Proprioception `(8,)`.
        action: Executed action `(7,)`.
        clean_action: The expert's action before noise, None when absent.
        sim_state: Flattened MuJoCo state, None when absent.
    """

    image: str
    wrist_image: str | None = None
    proprio: str
    action: str
    clean_action: str | None = None
    sim_state: str | None = None

    @classmethod
    def detect(cls, features: dict[str, Any], where: Path) -> LeRobotKeys:
        """Finds the names among a dataset's features.

        Raises:
            DatasetError: The image, the proprioception or the action is not to be found.
        """
        found = {
            role: next((name for name in names if name in features), None)
            for role, names in _CANDIDATES.items()
        }
        for role in _REQUIRED:
            if found[role] is None:
                raise DatasetError(
                    f"{where}: no feature for {role!r}; looked for "
                    f"{', '.join(_CANDIDATES[role])}; features present: "
                    f"{', '.join(features)}. Name them with keys=LeRobotKeys(...)"
                )
        return cls(**found)  # type: ignore[arg-type]

    def check(self, features: dict[str, Any], where: Path) -> None:
        """Raises `DatasetError` when a name is not among the features."""
        for role, name in vars(self).items():
            if name is not None and name not in features:
                raise DatasetError(
                    f"{where}: keys.{role}={name!r} is not a feature; "
                    f"features present: {', '.join(features)}"
                )


class LeRobotDataset:
    """A LeRobot v3.0 dataset on disk.

    Args:
        root: Folder that holds `meta/info.json`.
        keys: Names of the features; None finds them.
        rotate180: Turns every image by 180 degrees. The contract of `wmgym.spaces` is the turned
            camera of the modified LIBERO data, in which the robot stands upright. Our datasets and
            conversions of that data are stored so; conversions of LIBERO's original demonstrations,
            as OpenGL rendered them, are upside down and need `rotate180=True`.
        cache_bytes: Most memory spent on parquet row groups, bytes.

    Raises:
        DatasetError: A file is missing, damaged, of another format version, or lacks a feature.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        keys: LeRobotKeys | None = None,
        rotate180: bool = False,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.root = Path(root)
        self.meta = _read_info(self.root)
        self.features: dict[str, dict[str, Any]] = self.meta["features"]
        self.fps = self.meta["fps"]
        self.rotate180 = rotate180
        where = self.root / fmt.INFO_PATH
        self.keys = LeRobotKeys.detect(self.features, where) if keys is None else keys
        self.keys.check(self.features, where)
        self._rows = _read_episode_rows(self.root)
        tasks = dict.fromkeys(_instruction(row) for row in self._rows)
        number = {instruction: i for i, instruction in enumerate(tasks)}
        self._episodes = [
            _episode_info(i, row, number[_instruction(row)]) for i, row in enumerate(self._rows)
        ]
        self._tables = StepTables(cache_bytes)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.resolve().name

    @property
    def has_wrist(self) -> bool:
        """Whether there is a wrist camera."""
        return self.keys.wrist_image is not None

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """Descriptions of all episodes, by index."""
        return self._episodes

    def read(
        self, episode_id: int, start: int = 0, stop: int | None = None, *, wrist: bool = False
    ) -> Episode:
        """Steps `start ... stop` of one episode, with wrist images if asked for.

        Raises:
            IndexError: No such episode or steps.
            ValueError: Wrist images of a dataset without a wrist camera.
            DatasetError: The files are damaged.
        """
        start, stop = check_steps(self._episodes, episode_id, start, stop, self.root)
        if wrist and not self.has_wrist:
            raise ValueError(f"{self.root} has no wrist camera; read with wrist=False")
        numbers = [self.keys.clean_action, self.keys.sim_state]
        cameras = [self.keys.image, self.keys.wrist_image if wrist else None]
        names = [self.keys.proprio, self.keys.action, *numbers]
        names += [name for name in cameras if name and self.features[name]["dtype"] == "image"]
        table = self.table(episode_id, start, stop, [name for name in names if name])
        clean, sim = (column_array(table.column(n)) if n else None for n in numbers)
        images, wrist_images = (
            self._images(episode_id, start, stop, name, table) if name else None for name in cameras
        )
        assert images is not None
        return Episode(
            info=self._episodes[episode_id],
            start=start,
            images=images,
            proprio=column_array(table.column(self.keys.proprio)).astype(np.float32),
            actions=column_array(table.column(self.keys.action)).astype(np.float32),
            wrist_images=wrist_images,
            clean_actions=None if clean is None else clean.astype(np.float32),
            sim_states=None if sim is None else self._sim_states(episode_id, sim),
        )

    def read_numbers(self, episode_id: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Proprioception `(N, 8)` and actions `(N, 7)` of an episode, without decoding images.

        Raises:
            IndexError: No such episode.
            DatasetError: The files are damaged.
        """
        start, stop = check_steps(self._episodes, episode_id, 0, None, self.root)
        table = self.table(episode_id, start, stop, [self.keys.proprio, self.keys.action])
        proprio, actions = (column_array(c).astype(np.float32) for c in table.columns)
        return proprio, actions

    def table(self, episode_id: int, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Rows `start ... stop` of an episode, the given columns in the given order.

        Raises:
            DatasetError: The file is damaged or lacks the rows or columns.
        """
        row = self._rows[episode_id]
        path = self.root / self.meta["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        return self._tables.read(path, row["episode_index"], start, stop, columns)

    def clip(self, episode_id: int, key: str) -> Clip:
        """Where the video of a camera stored as video lies.

        Raises:
            DatasetError: The episode table does not say.
        """
        row = self._rows[episode_id]
        prefix = f"videos/{key}/"
        if prefix + "from_timestamp" not in row:
            raise DatasetError(f"{self.root}/meta/episodes lacks the columns {prefix}...")
        path = self.root / self.meta["video_path"].format(
            video_key=key,
            chunk_index=row[prefix + "chunk_index"],
            file_index=row[prefix + "file_index"],
        )
        return Clip(path, row[prefix + "from_timestamp"], row["length"], self.fps)

    def sim_state_size(self, episode_id: int) -> int:
        """Length of the simulator state of an episode, 0 without one."""
        if self.keys.sim_state is None:
            return 0
        size = self._rows[episode_id].get("sim_state_size")
        return self.features[self.keys.sim_state]["shape"][0] if size is None else size

    def fingerprint(self) -> str:
        """Hash of the metadata and of every file's name and size; changes when the data change."""
        digest = hashlib.sha256(repr((self.keys, self.rotate180)).encode())
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            digest.update(
                f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n".encode()
            )
            if path.relative_to(self.root).parts[0] == "meta":
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def _images(
        self, episode_id: int, start: int, stop: int, key: str, table: pa.Table
    ) -> NDArray[np.uint8]:
        if self.features[key]["dtype"] == "video":
            images = decode(self.clip(episode_id, key), start, stop)
        else:
            images = np.stack(
                [_decode_image(v, key, self.root) for v in table.column(key).to_pylist()]
            )
        return np.ascontiguousarray(images[:, ::-1, ::-1]) if self.rotate180 else images

    def _sim_states(self, episode_id: int, padded: NDArray) -> NDArray[np.float64]:
        return np.ascontiguousarray(padded[:, : self.sim_state_size(episode_id)], np.float64)


def _read_info(root: Path) -> dict[str, Any]:
    path = root / fmt.INFO_PATH
    if not root.is_dir():
        raise DatasetError(
            f"{root} is not a folder; expected a LeRobot {fmt.CODEBASE_VERSION} dataset"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["codebase_version"]
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; expected a LeRobot v3.0 dataset") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is damaged: {error!r}") from error
    if not str(version).startswith("v3."):
        raise DatasetError(
            f"{path}: codebase_version is {version!r}, only v3.x is read. Convert the dataset with "
            "lerobot's script convert_dataset_v21_to_v30"
        )
    missing = [key for key in ("features", "fps", "data_path") if key not in info]
    if missing:
        raise DatasetError(f"{path} is damaged: no entry {', '.join(missing)}")
    return info


def _read_episode_rows(root: Path) -> list[dict[str, Any]]:
    """The rows of the episode table in order of `episode_index`, without per-episode statistics."""
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"{folder} holds no parquet file")
    required = ["episode_index", "length", "data/chunk_index", "data/file_index", "tasks"]
    rows: list[dict[str, Any]] = []
    for path in paths:
        part = read_rows(path, skip_prefix="stats/")
        missing = [name for name in required if part and name not in part[0]]
        if missing:
            raise DatasetError(f"{path} lacks the columns {', '.join(missing)}")
        rows += part
    return sorted(rows, key=lambda row: row["episode_index"])


def _instruction(row: dict[str, Any]) -> str:
    return row["tasks"][0] if row["tasks"] else ""


def _episode_info(episode_id: int, row: dict[str, Any], task: int) -> EpisodeInfo:
    """Description of an episode; `task` counts instructions where no task id is stored."""
    task_id = row.get("task_id")
    return EpisodeInfo(
        episode_id=episode_id,
        length=row["length"],
        instruction=_instruction(row),
        suite=row.get("suite") or "",
        task_id=task if task_id is None else task_id,
        init_state_id=_or_unknown(row.get("init_state_id")),
        seed=_or_unknown(row.get("seed")),
        success=row.get("success"),
        extra=json.loads(row.get("extra") or "{}"),
    )


def _or_unknown(value: int | None) -> int:
    return -1 if value is None else value


def _decode_image(value: dict[str, Any], key: str, root: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        data = value["bytes"] or (root / value["path"]).read_bytes()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, TypeError, KeyError) as error:
        raise DatasetError(f"{root}: an image of {key} is missing or damaged: {error}") from error
