"""The verified reward: minus the distance from a reference trajectory, per control step.

    R1 = -mean|a - a*|    a*: the reference action; needs no world
    R2 = -d(x, y)         y: the recorded frame of the reference episode
    R3 = -d(x, y)         y: the frame that the same world imagines, from the same start and noise,
                          under the reference actions

    d(x, y) = w_mae mean|x - y| + w_lpips LPIPS(x, y)

R3 of the reference actions is exactly 0: equal frames have equal features and distance 0, whatever
the batch. A reference is encoded once and serves every member of a group.

Shapes: `B` environments, `T` control steps, `R` references of `T` steps, actions `(B, T, 7)` in
[-1, 1], frames `(B, T, 3, H, W)` float in [0, 1], rewards and terms `(B, T)` float32.

Source: "VLA-RFT" (2025), whose world-model reward is R3's distance with both weights 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wmgym.rewards.batches import in_fixed_batches
from wmgym.rewards.perceptual import LPIPS

_MICRO_BATCH = 8


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the terms of a frame's distance.

    Attributes:
        mae: Of the mean absolute difference of pixels in [0, 1], >= 0.
        lpips: Of LPIPS, >= 0.

    Raises:
        ValueError: A weight is negative or not finite, or both are 0.
    """

    mae: float = 1.0
    lpips: float = 1.0

    def __post_init__(self) -> None:
        valid = all(math.isfinite(w) and w >= 0 for w in (self.mae, self.lpips))
        if not valid or self.mae + self.lpips == 0:
            raise ValueError(f"{self}: weights must be finite and >= 0, and one of them > 0")


@dataclass(frozen=True)
class Reference:
    """Frames to compare with, and their LPIPS features.

    Attributes:
        frames: `(R, T, 3, H, W)` float32 in [0, 1].
        features: `(R, T, D)` float32, None where LPIPS is not used.
    """

    frames: Tensor
    features: Tensor | None


def action_reward(actions: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """R1: minus the mean absolute difference of actions `(B, T, 7)`.

    Returns:
        The reward `(B, T)` and its term `action_l1`.

    Raises:
        ValueError: The shapes differ or are not `(B, T, A)`.
    """
    if actions.ndim != 3 or actions.shape != reference.shape:
        raise ValueError(
            f"actions {tuple(actions.shape)} and reference {tuple(reference.shape)}: expected "
            "(B, T, 7) twice"
        )
    distance = (actions.float() - reference.float()).abs().mean(-1)
    return -distance, {"action_l1": distance}


def encode_reference(frames: Tensor, lpips: LPIPS | None) -> Reference:
    """Computes what a comparison with `frames` `(R, T, 3, H, W)` needs, once.

    Raises:
        ValueError: Wrong shape, or as in `LPIPS.features`.
    """
    _check_frames(frames)
    frames = frames.float()
    if lpips is None:
        return Reference(frames, None)
    with torch.no_grad():
        features = lpips.features(frames.flatten(0, 1))
    return Reference(frames, features.unflatten(0, frames.shape[:2]))


def frame_distance(
    frames: Tensor,
    reference: Reference,
    lpips: LPIPS | None,
    weights: RewardWeights,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """Distance of frames from reference frames, step by step.

    Args:
        frames: `(B, T, 3, H, W)` in [0, 1].
        reference: What `encode_reference` returned, with the same `lpips`.
        lpips: None leaves the term out; its weight must then be 0.
        weights: Weights of the terms.
        rows: `(B,)` int64, the reference of each row of `frames`; None stands for row `i` of `i`.

    Returns:
        `mae`, `lpips` if it is used, and their weighted sum `total`, each `(B, T)` float32.

    Raises:
        ValueError: Shapes do not fit, a row has no reference, or LPIPS or the reference's features
            are missing.
    """
    _check_frames(frames)
    if lpips is None and weights.lpips > 0:
        raise ValueError(f"{weights} needs LPIPS: pass lpips=LPIPS() or set the weight lpips=0")
    if lpips is not None and reference.features is None:
        raise ValueError("the reference has no LPIPS features: encode it with the same lpips")
    index = _flat_index(frames, reference, rows)
    targets = reference.frames.flatten(0, 1)
    target_features = None if reference.features is None else reference.features.flatten(0, 1)

    def terms(x: Tensor, chosen: Tensor) -> Tensor:
        y = targets.index_select(0, chosen)
        mae = (x.float() - y).abs().mean(-1).mean((1, 2))
        if lpips is None or target_features is None:
            return mae[:, None]
        perceptual = lpips.distance(lpips.features(x), target_features.index_select(0, chosen))
        # Equal frames are at distance 0 by definition, also where kernels are not deterministic.
        return torch.stack([mae, perceptual.masked_fill(mae == 0, 0.0)], dim=1)

    size = _MICRO_BATCH if lpips is None else lpips.micro_batch
    columns = in_fixed_batches(terms, size, frames.flatten(0, 1), index.flatten())
    names = ("mae",) if lpips is None else ("mae", "lpips")
    result = {n: columns[:, i].unflatten(0, index.shape) for i, n in enumerate(names)}
    total = weights.mae * result["mae"]
    if lpips is not None:
        total = total + weights.lpips * result["lpips"]
    return {**result, "total": total}


def frame_reward(
    frames: Tensor,
    reference: Reference,
    lpips: LPIPS | None,
    weights: RewardWeights,
    rows: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """R2 and R3: minus `frame_distance`, whose arguments and errors it shares.

    Returns:
        The reward `(B, T)` and its terms `mae` and, if used, `lpips`.
    """
    terms = frame_distance(frames, reference, lpips, weights, rows)
    total = terms.pop("total")
    return -total, terms


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
        raise ValueError(
            f"frames are {tuple(frames.shape)} {frames.dtype}: expected (B, T, 3, H, W) floating "
            "point in [0, 1]"
        )


def _flat_index(frames: Tensor, reference: Reference, rows: Tensor | None) -> Tensor:
    """Index `(B, T)` of every frame's counterpart among the `R * T` reference frames."""
    count, steps = frames.shape[:2]
    references = len(reference.frames)
    if frames.shape[1:] != reference.frames.shape[1:]:
        raise ValueError(
            f"frames {tuple(frames.shape)} and reference {tuple(reference.frames.shape)} have "
            "different steps or sizes"
        )
    rows = torch.arange(count) if rows is None else rows
    rows = rows.to(frames.device)
    if rows.shape != (count,):
        raise ValueError(
            f"rows {tuple(rows.shape)}: expected ({count},), one entry per row of frames"
        )
    if not bool(((rows >= 0) & (rows < references)).all()):
        raise ValueError(f"rows={rows.tolist()} do not fit {references} references")
    return rows[:, None] * steps + torch.arange(steps, device=frames.device)
