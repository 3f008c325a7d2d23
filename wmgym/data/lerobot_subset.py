"""Cuts episodes out of a LeRobot v3.0 dataset without re-encoding their video."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from wmgym.data import lerobot_format as fmt
from wmgym.data.lerobot import LeRobotDataset
from wmgym.data.lerobot_build import EpisodeSource, build_dataset


def subset(
    dataset_root: str | Path,
    out_dir: str | Path,
    episode_ids: Sequence[int],
    *,
    keep_sim_states: bool = True,
    keep_wrist: bool = True,
    episodes_per_file: int = 50,
) -> Path:
    """Writes a smaller dataset out of a bigger one; frames and numbers stay the same, bit for bit.

    Args:
        dataset_root: The bigger dataset, ours or a public one.
        out_dir: Folder of the smaller one, which must not exist; it appears when it is complete.
        episode_ids: Episodes in the order of their new index.
        keep_sim_states: Whether the simulator states are kept.
        keep_wrist: Whether the wrist camera is kept.
        episodes_per_file: Most episodes in one parquet or mp4 file.

    Returns:
        `out_dir`.

    Raises:
        IndexError: No such episode.
        ValueError: No episodes.
        FileExistsError: `out_dir` exists.
        DatasetError: A file is damaged, or an episode's video does not start at a keyframe.
    """
    dataset = LeRobotDataset(dataset_root)
    count = len(dataset.episodes)
    for episode_id in episode_ids:
        if not 0 <= episode_id < count:
            raise IndexError(
                f"episode {episode_id} of {dataset_root}: allowed are 0 ... {count - 1}"
            )
    dropped = set(fmt.BOOKKEEPING)
    if not keep_sim_states:
        dropped.add(fmt.SIM_STATE)
    if not keep_wrist and dataset.keys.wrist_image is not None:
        dropped.add(dataset.keys.wrist_image)
    features = {k: dict(f) for k, f in dataset.features.items() if k not in dropped}
    columns = [key for key, feature in features.items() if feature["dtype"] != "video"]
    cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
    sizes = {i: dataset.sim_state_size(i) if keep_sim_states else 0 for i in episode_ids}
    if fmt.SIM_STATE in features:
        features[fmt.SIM_STATE]["shape"] = [max(sizes.values(), default=0)]
    sources = [
        EpisodeSource(
            info=dataset.episodes[i],
            load_table=partial(dataset.table, i, 0, dataset.episodes[i].length, columns),
            clips={key: dataset.clip(i, key) for key in cameras},
            sim_state_size=sizes[i],
        )
        for i in episode_ids
    ]
    return build_dataset(
        Path(out_dir),
        sources,
        features,
        fps=dataset.fps,
        robot_type=dataset.meta.get("robot_type") or "unknown",
        extra_info=dataset.meta.get("wmgym") or {},
        episodes_per_file=episodes_per_file,
    )
