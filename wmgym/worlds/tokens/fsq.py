"""Finite scalar quantisation: a token is a few rounded numbers (Mentzer et al., arXiv 2309.15505).

Each of the `D` numbers of a latent vector is squashed into `L` levels and rounded; the level
numbers are the digits of the code, the first one the fastest. There is no codebook and nothing to
learn. Everything is float32: rounding in less would choose other codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS: dict[int, tuple[int, ...]] = {
    8: (8, 6, 5),
    10: (8, 5, 5, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
"""Levels per number, by the rounded log2 of the number of codes, as checkpoints name them."""

_MARGIN = 1e-3


class FSQ:
    """Codes `(...,)` int64 of latent vectors `(..., D)`, and back.

    Args:
        levels: Levels `L` of each of the `D` numbers.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        self.levels = levels
        self.codes = math.prod(levels)

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents rounded to levels, in [-1, 1]; the gradient passes straight through."""
        squashed = self._squash(latents.float())
        rounded = squashed + (squashed.round() - squashed).detach()
        return rounded / self._half(latents)

    def encode(self, latents: Tensor) -> Tensor:
        """Codes of latents `(..., D)`, each in `0 ... codes - 1`."""
        digits = self._squash(latents.float()).round().long() + self._half(latents).long()
        return (digits * self._basis(latents)).sum(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Rounded latents `(..., D)` float32 in [-1, 1] of codes; exact for any `quantize`."""
        levels = torch.tensor(self.levels, device=codes.device)
        digits = codes[..., None] // self._basis(codes) % levels
        half = self._half(codes)
        return (digits - half) / half

    def _squash(self, latents: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=latents.device)
        half = (levels - 1) * (1 + _MARGIN) / 2
        offset = 0.5 * (levels % 2 == 0)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def _half(self, like: Tensor) -> Tensor:
        return torch.tensor([float(n // 2) for n in self.levels], device=like.device)

    def _basis(self, like: Tensor) -> Tensor:
        steps = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        return torch.tensor(steps, device=like.device)
