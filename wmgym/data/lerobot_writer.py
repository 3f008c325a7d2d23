"""Writes LeRobot v3.0 datasets in two steps: workers stage episodes, one process assembles them.

`stage_episode` encodes one episode into its own folder of a staging area: an mp4 per camera, a
parquet of its steps, a JSON of what is known of it. The folder is filled under the name
`<name>.part` and renamed at the end, so that a killed worker leaves either the whole episode or
nothing that counts. `assemble` joins staged episodes, in the order given, into a dataset; it copies
packets and never re-encodes, and the same staged episodes in the same order give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmgym.data import lerobot_format as fmt
from wmgym.data.episodes import DatasetError, Episode, EpisodeInfo
from wmgym.data.lerobot_build import EpisodeSource, build_dataset
from wmgym.data.lerobot_tables import list_column, parquet_errors
from wmgym.data.video import Clip, encode

if TYPE_CHECKING:
    import pyarrow as pa

PART = ".part"
_INFO = "info.json"
_STEPS = "steps.parquet"


def stage_episode(
    staging_dir: str | Path, name: str, episode: Episode, *, fps: int = 20
) -> EpisodeInfo:
    """Writes one whole episode into the staging area, entirely or not at all.

    Any number of processes may stage episodes of different names at once. What a killed process
    left under `<name>.part` is overwritten by the next attempt and ignored by everything else.

    Args:
        staging_dir: The staging area, made if missing.
        name: Unique name of the episode, a file name that neither starts with "." nor ends with
            ".part".
        episode: The episode from its first step on. Its `info.episode_id` is not used; the entries
            of `info.extra` must be JSON values or numpy arrays (stored as lists) and scalars.
        fps: Steps per second.

    Returns:
        The description as it was stored.

    Raises:
        FileExistsError: An episode of this name is staged already.
        ValueError: The name is not a file name, or the arrays disagree, are empty or not finite.
    """
    if Path(name).name != name or name.startswith(".") or name.endswith(PART) or not name:
        raise ValueError(
            f"name={name!r}: expected a plain file name that neither starts with '.' nor ends "
            f"with {PART!r}"
        )
    _check(episode)
    folder = Path(staging_dir) / name
    if folder.exists():
        raise FileExistsError(f"{folder} is staged already; remove it or choose another name")
    part = folder.with_name(name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    encode(part / f"{fmt.IMAGE}.mp4", episode.images, fps)
    features = {fmt.IMAGE: fmt.video_feature(episode.images, fps)}
    if episode.wrist_images is not None:
        encode(part / f"{fmt.WRIST_IMAGE}.mp4", episode.wrist_images, fps)
        features[fmt.WRIST_IMAGE] = fmt.video_feature(episode.wrist_images, fps)
    sim_size = _write_steps(part / _STEPS, episode, features)
    described = dataclasses.asdict(dataclasses.replace(episode.info, episode_id=-1))
    document = {"fps": fps, "sim_state_size": sim_size, "features": features, "episode": described}
    text = json.dumps(document, default=_plain)
    (part / _INFO).write_text(text)
    part.replace(folder)
    return EpisodeInfo(**json.loads(text)["episode"])


def staged_names(staging_dir: str | Path) -> list[str]:
    """Names of all completely staged episodes, sorted; empty without a staging area."""
    folder = Path(staging_dir)
    if not folder.is_dir():
        return []
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.suffix != PART
    )


def assemble(
    staging_dir: str | Path,
    out_dir: str | Path,
    names: Sequence[str],
    *,
    fps: int = 20,
    robot_type: str = "panda",
    extra_info: dict[str, Any] | None = None,
    episodes_per_file: int = 50,
) -> Path:
    """Builds a dataset out of staged episodes; the staging area is left as it is.

    Args:
        staging_dir: The staging area.
        out_dir: Folder of the dataset, which must not exist; it appears when it is complete.
        names: Staged episodes in the order of their future index.
        fps: Steps per second, the same as when they were staged.
        robot_type: Name of the robot for info.json.
        extra_info: JSON entries put under the key `wmgym` of info.json.
        episodes_per_file: Most episodes in one parquet or mp4 file.

    Returns:
        `out_dir`.

    Raises:
        ValueError: No names, or episodes that differ in cameras, sizes, columns or `fps`.
        FileExistsError: `out_dir` exists.
        DatasetError: A staged episode is missing or damaged.
    """
    sources: list[EpisodeSource] = []
    features: dict[str, dict[str, Any]] = {}
    for name in names:
        folder = Path(staging_dir) / name
        document = _staged_document(folder)
        if document["fps"] != fps:
            raise ValueError(f"{folder} was staged with fps={document['fps']}, not {fps}")
        features = _merged_features(features, document["features"], folder)
        info = EpisodeInfo(**document["episode"])
        sources.append(
            EpisodeSource(
                info=info,
                load_table=partial(_read_table, folder / _STEPS),
                clips={
                    key: Clip(folder / f"{key}.mp4", 0.0, info.length, fps)
                    for key, feature in document["features"].items()
                    if feature["dtype"] == "video"
                },
                sim_state_size=document["sim_state_size"],
            )
        )
    return build_dataset(
        Path(out_dir),
        sources,
        features,
        fps=fps,
        robot_type=robot_type,
        extra_info=extra_info or {},
        episodes_per_file=episodes_per_file,
    )


def _check(episode: Episode) -> None:
    """Raises ValueError unless the episode is whole and its arrays agree."""
    length = episode.info.length
    if length < 1 or episode.start != 0:
        raise ValueError(
            f"expected a whole episode of at least one step, got start={episode.start} and "
            f"length={length}"
        )
    for field in dataclasses.fields(episode):
        array = getattr(episode, field.name)
        if not isinstance(array, np.ndarray):
            continue
        if len(array) != length:
            raise ValueError(f"{field.name} has {len(array)} steps, info.length is {length}")
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            raise ValueError(f"{field.name} contains NaN or infinity")


def _write_steps(path: Path, episode: Episode, features: dict[str, dict[str, Any]]) -> int:
    """Writes the numeric columns, describes them in `features`; returns the sim state's length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = {
        fmt.STATE: (episode.proprio, np.float32, fmt.STATE_NAMES),
        fmt.ACTION: (episode.actions, np.float32, fmt.ACTION_NAMES),
        fmt.CLEAN_ACTION: (episode.clean_actions, np.float32, fmt.ACTION_NAMES),
        fmt.SIM_STATE: (episode.sim_states, np.float64, None),
    }
    columns: dict[str, pa.Array] = {}
    for key, (values, dtype, names) in vectors.items():
        if values is not None:
            columns[key] = list_column(np.ascontiguousarray(values, dtype))
            features[key] = fmt.vector_feature(np.dtype(dtype).name, values.shape[1], names)
    columns[fmt.DONE] = pa.array(np.arange(len(episode)) == len(episode) - 1)
    features[fmt.DONE] = {"dtype": "bool", "shape": [1], "names": None}
    pq.write_table(pa.table(columns), path, compression="zstd")
    return 0 if episode.sim_states is None else episode.sim_states.shape[1]


def _merged_features(
    merged: dict[str, dict[str, Any]], features: dict[str, dict[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """The features of a dataset so far and of one more episode, which may differ in `sim_state`."""
    if not merged:
        return features
    if list(merged) != list(features):
        raise ValueError(
            f"{folder} has the features {sorted(features)}, the episodes before it "
            f"{sorted(merged)}; all episodes of a dataset must have the same"
        )
    for key, feature in features.items():
        if key != fmt.SIM_STATE and feature != merged[key]:
            raise ValueError(
                f"{folder}: {key} has shape {feature['shape']}, in the episodes before it "
                f"{merged[key]['shape']}"
            )
    if fmt.SIM_STATE in features:
        merged[fmt.SIM_STATE] = max(
            merged[fmt.SIM_STATE], features[fmt.SIM_STATE], key=lambda f: f["shape"][0]
        )
    return merged


def _staged_document(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _INFO).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DatasetError(f"{folder} is not a staged episode: {error}") from error


def _read_table(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with parquet_errors(path), pq.ParquetFile(path) as file:
        return file.read(use_threads=False)


def _plain(value: Any) -> Any:
    """Turns numpy values into what JSON can hold."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} in EpisodeInfo cannot be stored as JSON")
