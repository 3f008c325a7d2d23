"""What a training run consists of, and its checkpoints.

A checkpoint is one file that appears complete or not at all; it is read without unpickling anything
but tensors.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wmgym.worlds.checkpoints import CheckpointError
from wmgym.worlds.latent_world import LatentWorldModel


@dataclass
class Run:
    """Everything that is checkpointed."""

    model: LatentWorldModel
    average: LatentWorldModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        """Writes a checkpoint, entirely or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path, device: torch.device) -> None:
        """Goes back to a checkpoint.

        Raises:
            CheckpointError: It is damaged, or of a world of another shape.
        """
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = f"{error}".partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{path} is damaged, or of a world of another shape ({reason}); remove it to "
                "start anew"
            ) from None


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the current ones; buffers are copied."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
