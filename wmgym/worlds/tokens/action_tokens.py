"""Actions as tokens: 256 bins over a range that is stored beside the checkpoint.

In which convention the published worlds were trained is an open question of the release: their
range is that of LIBERO's raw actions, yet the released fine-tuning feeds them what the policy is
trained on, `2 (x - q01) / (q99 - q01) - 1` and the gripper as 1 open, 0 closed. So the convention
is an entry of the checkpoint, `action_space`, and `wmgym diagnose` tells which one fits.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.checkpoints import CheckpointError, read_json, reason_of
from wmgym.files import write_text
from wmgym.spaces import ACTION_DIM

ActionSpace = Literal["raw", "normalised"]
FILE = "actions.json"
PUBLISHED_FILE = "libero_action_ranges.pth"
PUBLISHED_RANGES = (
    (-0.9375, 0.9375),
    (-0.9375, 0.9375),
    (-0.9375, 0.9375),
    (-0.258214295, 0.355714291),
    (-0.375, 0.375),
    (-0.367500007, 0.375),
    (-1.0, 1.0),
)
"""Least and largest raw action by dimension, as released for LIBERO."""

_EPSILON = 1e-8
_DAMAGED = (TypeError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True)
class ActionTokens:
    """How actions become bins.

    Attributes:
        ranges: `(least, largest)` of every dimension.
        action_space: "raw": bins of LIBERO's actions. "normalised": of those scaled by `quantiles`,
            the gripper 1 open and 0 closed.
        quantiles: `(q01, q99)` of the six dimensions before the gripper, for "normalised".
        bins: Bins of a dimension.

    Raises:
        ValueError: Unknown convention, ranges or quantiles that are none, quantiles missing, or
            bins that cannot be counted.
    """

    ranges: tuple[tuple[float, float], ...] = PUBLISHED_RANGES
    action_space: ActionSpace = "raw"
    quantiles: tuple[tuple[float, float], ...] | None = None
    bins: int = 256

    def __post_init__(self) -> None:
        if self.action_space not in get_args(ActionSpace):
            raise ValueError(
                f"action_space={self.action_space!r}: allowed are {get_args(ActionSpace)}"
            )
        if len(self.ranges) != ACTION_DIM or any(not low < high for low, high in self.ranges):
            raise ValueError(
                f"ranges={self.ranges}: expected {ACTION_DIM} pairs (least, largest), least first"
            )
        pairs = self.quantiles
        if (pairs is None and self.action_space == "normalised") or (
            pairs is not None
            and (len(pairs) != ACTION_DIM - 1 or any(not low <= high for low, high in pairs))
        ):
            raise ValueError(
                f"action_space='normalised' needs quantiles, {ACTION_DIM - 1} pairs (q01, q99) of "
                f"raw actions, q01 first; given {pairs}"
            )
        if not isinstance(self.bins, int) or self.bins < 1:
            raise ValueError(f"bins={self.bins!r}: allowed are integers >= 1")

    def encode(self, actions: Tensor) -> Tensor:
        """Bins `(..., 7)` int64 in `0 ... bins - 1` of LIBERO's actions `(..., 7)`."""
        values = self.convert(actions)
        low, high = self._columns(self.ranges, values)
        share = ((values - low) / (high - low + _EPSILON)).clamp(0, 1)
        return (share * self.bins).floor().long().clamp(0, self.bins - 1)

    def convert(self, actions: Tensor) -> Tensor:
        """LIBERO's actions `(..., 7)` in the convention, float32: what bins are bins of."""
        values = actions.float()
        if self.quantiles is None or self.action_space == "raw":
            return values
        low, high = self._columns(self.quantiles, values)
        scaled = 2 * (values[..., :-1] - low) / (high - low + _EPSILON) - 1
        is_open = 1 - values[..., -1:].clamp(0, 1)
        return torch.cat([scaled.clamp(-1, 1), is_open], dim=-1)

    def save(self, folder: Path) -> None:
        """Writes `actions.json`."""
        entries = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        write_text(folder / FILE, json.dumps(entries, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ActionTokens:
        """Reads `actions.json`, else the released file, else takes the released ranges.

        Raises:
            CheckpointError: A file is damaged or does not describe actions.
        """
        try:
            if (folder / FILE).exists():
                entries: dict[str, Any] = read_json(folder / FILE)
                for name in {"ranges", "quantiles"} & entries.keys():
                    entries[name] = tuple((float(a), float(b)) for a, b in entries[name])
                return cls(**entries)
            if (folder / PUBLISHED_FILE).exists():
                table = torch.load(folder / PUBLISHED_FILE, weights_only=True, map_location="cpu")
                values = torch.as_tensor(table).double().reshape(ACTION_DIM, 2).tolist()
                return cls(tuple((a, b) for a, b in values))
        except (*_DAMAGED, OSError) as error:
            reason = reason_of(error)
            raise CheckpointError(f"the ranges of actions in {folder}: {reason}") from None
        return cls()

    def _columns(
        self, pairs: tuple[tuple[float, float], ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor(pairs, dtype=torch.float32, device=like.device).T
        return low, high


def quantiles_of(actions: NDArray[np.float32]) -> tuple[tuple[float, float], ...]:
    """`(q01, q99)` of the six dimensions before the gripper of raw actions `(N, 7)`."""
    low, high = np.quantile(actions[:, :-1].astype(np.float64), (0.01, 0.99), axis=0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))
