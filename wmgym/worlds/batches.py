"""What one optimizer step sees: windows out of a frame cache, as tensors on the device.

A world that is rolled out for longer than one chunk goes on from frames it has imagined itself.
Some batches therefore come with a lead: the chunks of actions before the window's own, from which
`go_on` imagines the frame the window starts from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.data import FrameCache, WindowSampler
from wmgym.distributed import Processes
from wmgym.worlds.dynamics import READINGS
from wmgym.worlds.latent_world import LatentWorldModel

_TARGETS = 2


@dataclass(frozen=True)
class Batch:
    """Windows on the device.

    Attributes:
        context: `(B, 3, H, W)` in [0, 1], before the lead.
        proprio: `(B, 2, 8)` at the context frame.
        lead: `(B, n T, 7)` actions of the `n >= 0` chunks that come before the window's own.
        targets: `(B, M, 3, H, W)` in [0, 1].
        offsets: The `M` future steps of the targets after the lead, from 1, ascending, shared by
            all rows.
        future_proprio: `(B, T, 8)` after every action.
        actions: `(B, T, 7)`.
    """

    context: Tensor
    proprio: Tensor
    lead: Tensor
    targets: Tensor
    offsets: tuple[int, ...]
    future_proprio: Tensor
    actions: Tensor


class Windows:
    """Batches of windows of a frame cache.

    Args:
        cache: The decoded episodes.
        horizon: Control steps `T` of a window.
        seed: Seed of the draws.
        device: Where the batches go.
        lead: Most chunks of `T` steps that come before a window's own, >= 0.

    Raises:
        ValueError: No episode is long enough.
    """

    def __init__(
        self, cache: FrameCache, horizon: int, seed: int, device: torch.device, lead: int = 0
    ) -> None:
        self.horizon, self.seed, self.device = horizon, seed, device
        try:
            self.samplers = [
                WindowSampler(cache, horizon=horizon * (1 + n), context=READINGS, seed=seed)
                for n in range(lead + 1)
            ]
        except ValueError as error:
            raise ValueError(f"lead={lead} with chunks of {horizon} steps: {error}") from None

    def batch(self, step: int, size: int, where: Processes, *, lead: int = 0) -> Batch:
        """This process's share of the batch of a step, with 0 ... `lead` chunks before it.

        Raises:
            ValueError: `size` is not a multiple of the number of processes.
        """
        if size % where.size:
            raise ValueError(f"batch_size={size} is not a multiple of the {where.size} processes")
        rng = np.random.default_rng([self.seed, step, 2])
        count = min(_TARGETS, self.horizon)
        offsets = np.sort(rng.choice(self.horizon, size=count, replace=False)) + 1
        lead = int(rng.integers(lead + 1))
        rows = self.samplers[lead].indices(step, size)[where.rank :: where.size]
        return self.gather(rows, tuple(int(k) for k in offsets), lead)

    def gather(self, rows: NDArray[np.int64], offsets: tuple[int, ...], lead: int = 0) -> Batch:
        """The windows `rows` after `lead` chunks, with the future frames `offsets` (from 1)."""
        before = lead * self.horizon
        shown = np.tile(np.asarray(offsets) + before, (len(rows), 1))
        window = self.samplers[lead].gather(rows, shown)
        frames = torch.from_numpy(window["frames"]).to(self.device)
        frames = frames.permute(0, 1, 4, 2, 3).float() / 255
        proprio = torch.from_numpy(window["proprio"]).to(self.device)
        actions = torch.from_numpy(window["actions"]).to(self.device)
        return Batch(
            context=frames[:, READINGS - 1],
            proprio=proprio[:, :READINGS],
            lead=actions[:, :before],
            targets=frames[:, READINGS:],
            offsets=offsets,
            future_proprio=proprio[:, READINGS + before :],
            actions=actions[:, before:],
        )


@torch.no_grad()
def go_on(model: LatentWorldModel, batch: Batch) -> Batch:
    """The batch after its lead, from the frames and readings that `model` imagines there."""
    frame, proprio = batch.context, batch.proprio
    for actions in batch.lead.split(batch.actions.shape[1], dim=1):
        if actions.shape[1]:
            frame, proprio = model.imagine_last(frame, proprio, actions)
    return dataclasses.replace(batch, context=frame, proprio=proprio, lead=batch.lead[:, :0])
