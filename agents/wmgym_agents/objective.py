"""GRPO in formulas: what a group's rewards say about its members, and the clipped policy loss.

For `G` chunks drawn at the same start, the advantage of a member is its reward against the group's
(Shao et al. 2024, arXiv 2402.03300):

| | |
| --- | --- |
| `mean_std` | `(r - mean) / (std + 1e-6)`, unbiased std of the group: VLA-RFT's |
| `mean` | `r - mean`: starts where little is at stake count little (Liu et al. 2025, Dr. GRPO) |
| `batch_std` | `(r - mean) / (mean of the groups' stds + 1e-6)` |
| `rloo` | `r - mean of the others` (Ahmadian et al. 2024) |

The loss is PPO's with the ratio per number of the chunk, as in VLA-RFT, or of the chunk as a whole,
with bounds of their own below and above (clip-higher, DAPO, Yu et al. 2025) and the dual clip of Ye
et al. 2020, which bounds what a single bad chunk can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["mean_std", "mean", "batch_std", "rloo"]
Ratio = Literal["dimension", "chunk"]

_EPSILON = 1e-6


def group_advantages(rewards: Tensor, kind: Advantage) -> Tensor:
    """Advantages of the members of groups.

    Args:
        rewards: `(B, G)`, `G >= 2`.
        kind: See the module docstring.

    Returns:
        `(B, G)`; every group sums to 0.

    Raises:
        ValueError: Groups of one, or an unknown kind.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, expected (B, G), G >= 2")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    if kind == "mean_std":
        return centred / (std + _EPSILON)
    if kind == "mean":
        return centred
    if kind == "batch_std":
        return centred / (std.mean() + _EPSILON)
    if kind == "rloo":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    raise ValueError(f"advantage={kind!r}: allowed are mean_std, mean, batch_std, rloo")


def rewards_to_go(rewards: Tensor) -> Tensor:
    """What a chunk can still change: rewards `(C, B, G)` from it to the end, over all `C` chunks.

    Of the first chunk this is the mean reward of the rollout.
    """
    return rewards.flip(0).cumsum(0).flip(0) / len(rewards)


@dataclass(frozen=True)
class ClipConfig:
    """Bounds of the policy loss.

    A ratio is 1 until the policy has moved from the one that drew, so bounds only act in the second
    and later optimizer steps on a batch (`epochs` > 1).

    Attributes:
        ratio: Whether the probability ratio is that of every number or that of the chunk.
        low: How far below 1 a ratio may fall and still be followed.
        high: How far above 1 it may rise.
        dual: Bound on the ratio where the advantage is negative.
    """

    ratio: Ratio = "dimension"
    low: float = 0.2
    high: float = 0.2
    dual: float = 3.0

    def __post_init__(self) -> None:
        if not (0 < self.low < 1 and 0 < self.high < math.inf and 1 < self.dual < math.inf):
            raise ValueError(
                f"low={self.low}, high={self.high}, dual={self.dual}: allowed are 0 < low < 1, "
                "high > 0, dual > 1, all finite"
            )
        if self.ratio not in ("dimension", "chunk"):
            raise ValueError(f"ratio={self.ratio!r}: allowed are 'dimension' and 'chunk'")


def policy_loss(
    new: Tensor, old: Tensor, advantage: Tensor, clip: ClipConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss.

    Args:
        new: `(N, M, 7)` log-densities under the policy that is trained.
        old: `(N, M, 7)` log-densities under the policy that drew the chunks.
        advantage: `(N,)`.
        clip: Bounds.

    Returns:
        The loss, and detached figures: `ratio`, `ratio_error` (largest distance to 1 in a chunk),
        `clip_fraction`, `approx_kl` (`old - new`, of either sign). All are means over the chunks.
    """
    difference = new - old
    if clip.ratio == "chunk":
        difference = difference.sum(dim=(1, 2), keepdim=True)
    ratio = difference.exp()
    weight = advantage[:, None, None]
    plain = -weight * ratio
    clipped = -weight * ratio.clamp(1 - clip.low, 1 + clip.high)
    worse = torch.maximum(plain, clipped)
    loss = torch.where(weight < 0, torch.minimum(worse, -weight * clip.dual), worse)
    figures = {
        "ratio": ratio.mean(),
        "ratio_error": (ratio - 1).abs().amax(dim=(1, 2)).mean(),
        "clip_fraction": (clipped > plain).float().mean(),
        "approx_kl": (old - new).mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in figures.items()}


def kl_gate(kl: Tensor, low: float = 0.0, high: float = 0.2) -> Tensor:
    """Weight in [0, 1] that the released VLA-RFT puts on its imitation term, by measured KL."""
    return ((kl - low) / (high - low)).clamp(0, 1)
