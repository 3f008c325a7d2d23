"""What the next frames' latents will be, given what the arm is told to do.

All frames of a chunk are predicted at once, each from the actions up to it: one transformer over
`T x (S + 1)` tokens, where step `t` has `S` tokens that become the latents of frame `t + 1` and one
that carries action `t`, the sum of the actions so far (where the arm is being sent) and becomes the
proprioception after it. Attention is full within a step, causal over steps, and crosses over to the
context frame's features. A prediction is therefore the same whether a chunk is asked for at once or
step by step.

Proprioception is predicted as a change from the last reading; two readings tell the arm's speed,
which one picture cannot. Shapes: actions `(B, T, 7)`, proprioception `(B, 2, 8)` oldest first,
coarse features `(B, N, D)`, latents `(B, T, S, Z)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wmgym.spaces import ACTION_DIM, PROPRIO_DIM
from wmgym.worlds.layers import TokenBlock

READINGS = 2
"""Proprioceptive readings the dynamics start from: the last one and the one before."""

_STEPS_OF_CHANGE = 4.0


@dataclass(frozen=True)
class DynamicsConfig:
    """Shape of `LatentDynamics`.

    Attributes:
        horizon: Most control steps `T` predicted from one context frame.
        layers: Transformer layers.
        heads: Attention heads.
    """

    horizon: int = 8
    layers: int = 3
    heads: int = 4


class LatentDynamics(nn.Module):
    """Predicts latents and proprioception; see the module docstring.

    Args:
        config: Shape of the transformer.
        width: Width `D` of its tokens and of the context features.
        slots: Latent vectors `S` of a frame.
        latent: Width `Z` of a latent vector.
    """

    def __init__(self, config: DynamicsConfig, *, width: int, slots: int, latent: int) -> None:
        super().__init__()
        self.config, self.slot_count = config, slots
        self.register_buffer("proprio_mean", torch.zeros(PROPRIO_DIM))
        self.register_buffer("proprio_std", torch.ones(PROPRIO_DIM))
        self.register_buffer("change_std", torch.ones(PROPRIO_DIM))
        inputs = 2 * ACTION_DIM + READINGS * PROPRIO_DIM
        self.command = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.slots = nn.Parameter(torch.randn(slots + 1, width) * 0.5)
        self.time = nn.Parameter(torch.randn(config.horizon, width) * 0.1)
        self.blocks = nn.ModuleList(
            TokenBlock(width, config.heads, cross=True) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.to_latent = nn.Linear(width, latent)
        self.to_change = nn.Linear(width, PROPRIO_DIM)
        nn.init.zeros_(self.to_change.weight)
        nn.init.zeros_(self.to_change.bias)
        steps = torch.arange(config.horizon).repeat_interleave(slots + 1)
        self.register_buffer("mask", steps[:, None] >= steps[None, :], persistent=False)

    def pose(self, before: Tensor, now: Tensor) -> Tensor:
        """What the decoder is told of the arm: `(B, 16)`, in standard units.

        Args:
            before: `(B, 8)` proprioception at the context frame.
            now: `(B, 8)` proprioception at the frame to draw.
        """
        mean, std = self.get_buffer("proprio_mean"), self.get_buffer("proprio_std")
        moved = (now - before) / (_STEPS_OF_CHANGE * self.get_buffer("change_std"))
        return torch.cat([(before - mean) / std, moved], dim=-1)

    def forward(self, coarse: Tensor, proprio: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts a chunk.

        Args:
            coarse: `(B, N, D)` features of the context frame.
            proprio: `(B, 2, 8)` readings before and at the context frame.
            actions: `(B, T, 7)`, `T <= horizon`.

        Returns:
            Latents `(B, T, S, Z)` and proprioception `(B, T, 8)` float32 after every action.
        """
        batch, steps, _ = actions.shape
        if steps > self.config.horizon:
            raise ValueError(f"{steps} actions: the horizon is {self.config.horizon}")
        mean, std = self.get_buffer("proprio_mean"), self.get_buffer("proprio_std")
        change_std = self.get_buffer("change_std")
        last = proprio[:, -1]
        speed = (last - proprio[:, 0]) / change_std
        arm = torch.cat([(last - mean) / std, speed], dim=-1)[:, None].expand(-1, steps, -1)
        told = torch.cat([actions, actions.cumsum(dim=1) / 4, arm], dim=-1)
        command = self.command(told) + self.time[:steps]
        x = (command[:, :, None] + self.slots).flatten(1, 2)
        length = x.shape[1]
        mask = self.get_buffer("mask")[:length, :length]
        for block in self.blocks:
            x = block(x, coarse, mask)
        x = self.norm(x).view(batch, steps, self.slot_count + 1, -1)
        change = self.to_change(x[:, :, -1]).float() * change_std
        return self.to_latent(x[:, :, :-1]), last[:, None] + change.cumsum(dim=1)
