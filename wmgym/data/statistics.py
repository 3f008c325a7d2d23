"""Statistics of actions and proprioception, and the normalisation that policies make of them.

`BOUNDS_Q99` maps the 1st and 99th percentile to -1 and 1 and clips:
`clip(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)`, on the dimensions of a mask; others pass
through, and a dimension whose minimum equals its maximum becomes 0, as in OpenVLA and VLA-RFT. The
mask of actions leaves out the gripper. Files have the shape of the published
`dataset_statistics.json`: `{name: {action: {mean, std, min, max, q01, q99, mask}, proprio: {...},
num_transitions, num_trajectories}}`.

The published files describe actions whose gripper was turned round for training, 1 to open and 0 to
close; statistics made here describe LIBERO's own, -1 to open and +1 to close. Since the gripper is
masked out, normalised actions differ in nothing but the gripper itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmgym.data.episodes import EpisodeInfo, StoredDataset
from wmgym.files import write_text


@dataclass(frozen=True)
class VectorStatistics:
    """Statistics of one vector of `D` entries; every attribute is `(D,)` float64.

    Attributes:
        mean: Mean.
        std: Standard deviation (population).
        min: Minimum.
        max: Maximum.
        q01: 1st percentile.
        q99: 99th percentile.
        mask: `(D,)` bool, dimensions that are normalised.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    q01: NDArray[np.float64]
    q99: NDArray[np.float64]
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray, mask: NDArray[np.bool_] | None = None) -> VectorStatistics:
        """Statistics of values `(N, D)`; without a mask every dimension is normalised.

        Raises:
            ValueError: Not two-dimensional, or without rows.
        """
        if values.ndim != 2 or not len(values):
            raise ValueError(f"values have shape {values.shape}, expected (N, D) with N >= 1")
        x = values.astype(np.float64)
        return cls(
            mean=x.mean(0),
            std=x.std(0),
            min=x.min(0),
            max=x.max(0),
            q01=np.quantile(x, 0.01, axis=0),
            q99=np.quantile(x, 0.99, axis=0),
            mask=np.ones(x.shape[1], np.bool_) if mask is None else np.asarray(mask, np.bool_),
        )

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> VectorStatistics:
        """From an entry of dataset_statistics.json; a missing mask normalises every dimension.

        Raises:
            ValueError: An entry is missing.
        """
        names = ("mean", "std", "min", "max", "q01", "q99")
        _check_entries(entries, names)
        arrays = {name: np.asarray(entries[name], np.float64) for name in names}
        mask = np.asarray(entries.get("mask", np.ones(len(arrays["mean"]))), np.bool_)
        return cls(**arrays, mask=mask)

    def to_dict(self) -> dict[str, list]:
        """As an entry of dataset_statistics.json."""
        return {name: value.tolist() for name, value in vars(self).items()}


@dataclass(frozen=True)
class Statistics:
    """Statistics of a dataset.

    Attributes:
        action: Of the actions, `D = 7`, the gripper not masked in.
        proprio: Of the proprioception, `D = 8`.
        num_transitions: Number of steps.
        num_trajectories: Number of episodes.
    """

    action: VectorStatistics
    proprio: VectorStatistics
    num_transitions: int
    num_trajectories: int

    @classmethod
    def of(
        cls,
        datasets: Iterable[StoredDataset],
        episode_filter: Callable[[EpisodeInfo], bool] | None = None,
    ) -> Statistics:
        """Statistics over the episodes of datasets that pass the filter.

        Only actions and proprioception are read, and held in memory, 60 bytes a step.

        Raises:
            ValueError: No episode passes.
            DatasetError: The files are damaged.
        """
        proprio, actions = [], []
        for dataset in datasets:
            for info in dataset.episodes:
                if episode_filter is None or episode_filter(info):
                    p, a = dataset.read_numbers(info.episode_id)
                    proprio.append(p)
                    actions.append(a)
        if not actions:
            raise ValueError("no episode passes episode_filter; statistics need at least one")
        dimensions = actions[0].shape[1]
        return cls(
            action=VectorStatistics.of(
                np.concatenate(actions), mask=np.arange(dimensions) < dimensions - 1
            ),
            proprio=VectorStatistics.of(np.concatenate(proprio)),
            num_transitions=sum(map(len, actions)),
            num_trajectories=len(actions),
        )

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Statistics:
        """Reads a dataset_statistics.json.

        Args:
            path: The file.
            name: Key of the dataset in it; None takes the only one.

        Raises:
            ValueError: The file holds no such key, several without a name, or lacks entries.
        """
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if name is None and len(document) == 1:
            name = next(iter(document))
        if name not in document:
            raise ValueError(f"{path}: name={name!r}, allowed are {', '.join(sorted(document))}")
        return cls.from_dict(document[name])

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Statistics:
        """From the value of one key of dataset_statistics.json.

        Raises:
            ValueError: An entry is missing.
        """
        _check_entries(entries, ("action", "proprio", "num_transitions", "num_trajectories"))
        return cls(
            action=VectorStatistics.from_dict(entries["action"]),
            proprio=VectorStatistics.from_dict(entries["proprio"]),
            num_transitions=int(entries["num_transitions"]),
            num_trajectories=int(entries["num_trajectories"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As the value of one key of dataset_statistics.json."""
        return {
            "action": self.action.to_dict(),
            "proprio": self.proprio.to_dict(),
            "num_transitions": self.num_transitions,
            "num_trajectories": self.num_trajectories,
        }

    def save(self, path: str | Path, name: str) -> None:
        """Writes a dataset_statistics.json with this as its only key, atomically."""
        write_text(Path(path), json.dumps({name: self.to_dict()}, indent=2))


def _check_entries(entries: Collection[str], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in entries]
    if missing:
        raise ValueError(f"statistics lack {', '.join(missing)}; present: {', '.join(entries)}")
