"""What one optimizer step sees: windows out of a frame cache, as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.data import FrameCache, WindowSampler
from wmgym.distributed import Processes
from wmgym.worlds.dynamics import READINGS

_TARGETS = 2


@dataclass(frozen=True)
class Batch:
    """Windows on the device.

    Attributes:
        context: `(B, 3, H, W)` in [0, 1].
        targets: `(B, M, 3, H, W)` in [0, 1].
        offsets: The `M` future steps of the targets, from 1, ascending, shared by all rows.
        proprio: `(B, 2, 8)` at the context frame.
        future_proprio: `(B, T, 8)` after every action.
        actions: `(B, T, 7)`.
    """

    context: Tensor
    targets: Tensor
    offsets: tuple[int, ...]
    proprio: Tensor
    future_proprio: Tensor
    actions: Tensor


class Windows:
    """Batches of windows of a frame cache.

    Args:
        cache: The decoded episodes.
        horizon: Control steps `T` of a window.
        seed: Seed of the draws.
        device: Where the batches go.
    """

    def __init__(self, cache: FrameCache, horizon: int, seed: int, device: torch.device) -> None:
        self.sampler = WindowSampler(cache, horizon=horizon, context=READINGS, seed=seed)
        self.horizon, self.seed, self.device = horizon, seed, device

    def batch(self, step: int, size: int, where: Processes) -> Batch:
        """This process's share of the batch of a step.

        Raises:
            ValueError: `size` is not a multiple of the number of processes.
        """
        if size % where.size:
            raise ValueError(f"batch_size={size} is not a multiple of the {where.size} processes")
        rng = np.random.default_rng([self.seed, step, 2])
        count = min(_TARGETS, self.horizon)
        offsets = np.sort(rng.choice(self.horizon, size=count, replace=False)) + 1
        rows = self.sampler.indices(step, size)[where.rank :: where.size]
        return self.gather(rows, tuple(int(k) for k in offsets))

    def gather(self, rows: NDArray[np.int64], offsets: tuple[int, ...]) -> Batch:
        """The windows `rows` with the future frames `offsets` (from 1)."""
        window = self.sampler.gather(rows, np.tile(offsets, (len(rows), 1)))
        frames = torch.from_numpy(window["frames"]).to(self.device)
        frames = frames.permute(0, 1, 4, 2, 3).float() / 255
        proprio = torch.from_numpy(window["proprio"]).to(self.device)
        return Batch(
            context=frames[:, READINGS - 1],
            targets=frames[:, READINGS:],
            offsets=offsets,
            proprio=proprio[:, :READINGS],
            future_proprio=proprio[:, READINGS:],
            actions=torch.from_numpy(window["actions"]).to(self.device),
        )
