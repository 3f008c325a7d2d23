"""The blocks the small world is made of: attention over tokens, convolution over grids.

Two resolutions, one code: a coarse grid of `g x g` tokens for what moves where, a fine one of
`2g x 2g` for edges. Attention blocks are pre-norm transformer layers with optional cross-attention
(Vaswani et al. 2017, Xiong et al. 2020); grid blocks are ConvNeXt layers (Liu et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention from `(B, N, D)` to `(B, M, D)`.

    Written out: with fewer than a hundred tokens, the fused kernel of PyTorch 2.13 takes 2.5 to 6
    times as long in bfloat16 on a CPU, forward and backward.

    Args:
        width: `D`.
        heads: Number of heads; divides `D`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from `x` to `memory`; `mask` `(N, M)` is True where attention is allowed."""
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (
            part.view(batch, memory.shape[1], self.heads, -1).transpose(1, 2)
            for part in self.key_value(memory).chunk(2, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def modulate(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Feature-wise modulation (Perez et al. 2018) of `(B, N, D)` by `(B, D)` each."""
    return normed * (1 + scale[:, None]) + shift[:, None]


class TokenBlock(nn.Module):
    """Self-attention, optional cross-attention, and an MLP, each after a LayerNorm.

    Args:
        width: Width `D` of tokens, memory and condition.
        heads: Attention heads.
        cross: Whether it attends to memory.
        conditioned: Whether a vector `(B, D)` modulates the norms, as in DiT (Peebles, Xie 2023).
        expansion: Width of the MLP in units of `D`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        cross: bool,
        conditioned: bool = False,
        expansion: int = 3,
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 4 * width) if conditioned else None
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, heads) if cross else None
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """`x` `(B, N, D)`, `memory` `(B, M, D)`, `mask` `(N, N)`, `condition` `(B, D)`."""
        normed = self.self_norm(x)
        late = None
        if self.modulation is not None:
            if condition is None:
                raise ValueError("a conditioned block needs a condition")
            scale, shift, *late = self.modulation(condition).chunk(4, dim=-1)
            normed = modulate(normed, scale, shift)
        x = x + self.self_attention(normed, normed, mask)
        if self.cross_norm is not None and self.cross_attention is not None:
            if memory is None:
                raise ValueError("a block with cross-attention needs memory")
            x = x + self.cross_attention(self.cross_norm(x), memory)
        normed = self.mlp_norm(x)
        return x + self.mlp(modulate(normed, *late) if late else normed)


class GridBlock(nn.Module):
    """Depthwise 3x3 convolution and an MLP on a grid of tokens `(B, g * g, D)`.

    Args:
        width: Width `D` of tokens.
        condition: Width of a vector `(B, condition)` that modulates the norm; None for none.
        expansion: Width of the MLP in units of `D`.
    """

    def __init__(self, width: int, *, condition: int | None = None, expansion: int = 3) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 2 * width) if condition else None
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Same shape out as in."""
        batch, tokens, width = x.shape
        side = round(tokens**0.5)
        grid = x.view(batch, side, side, width).permute(0, 3, 1, 2)
        normed = self.norm(self.mix(grid).permute(0, 2, 3, 1).reshape(batch, tokens, width))
        if self.modulation is not None:
            if condition is None:
                raise ValueError("a conditioned block needs a condition")
            normed = modulate(normed, *self.modulation(condition).chunk(2, dim=-1))
        return x + self.mlp(normed)


def merge(x: Tensor) -> Tensor:
    """Joins 2x2 neighbours: `(B, (2g)^2, D)` to `(B, g^2, 4D)`."""
    batch, tokens, width = x.shape
    half = round(tokens**0.5) // 2
    x = x.view(batch, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, half * half, 4 * width)


def split(x: Tensor) -> Tensor:
    """The inverse of `merge`: `(B, g^2, 4D)` to `(B, (2g)^2, D)`."""
    batch, tokens, width = x.shape
    side = round(tokens**0.5)
    x = x.view(batch, side, side, 2, 2, width // 4).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 4 * tokens, width // 4)


def to_patches(images: Tensor, patch: int) -> Tensor:
    """`(B, C, H, W)` to `(B, (H/p)(W/p), C p p)`."""
    return F.pixel_unshuffle(images, patch).flatten(2).transpose(1, 2)


def from_patches(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `to_patches` for square images: `(B, N, C p p)` to `(B, C, H, W)`."""
    batch, count, width = tokens.shape
    side = round(count**0.5)
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(batch, width, side, side), patch)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Samples images where the flow points to.

    Args:
        images: `(B, C, H, W)`.
        flow: `(B, 2, H, W)`: pixel `(y, x)` of the result comes from `(y + flow_y, x + flow_x)`,
            in pixels, bilinear, clamped to the border.

    Returns:
        `(B, C, H, W)`.
    """
    height, width = images.shape[-2:]
    ys = torch.arange(height, device=images.device, dtype=images.dtype)
    xs = torch.arange(width, device=images.device, dtype=images.dtype)
    y = (ys[:, None] + flow[:, 0]) * (2 / (height - 1)) - 1
    x = (xs[None, :] + flow[:, 1]) * (2 / (width - 1)) - 1
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)
