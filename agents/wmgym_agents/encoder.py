"""Eyes and ears of the small policy: a picture and an instruction as tokens.

Small enough to be trained from nothing on two CPU cores. The picture goes through a few strided
convolutions to a 16 x 16 grid and ConvNeXt blocks that are modulated by the instruction (FiLM,
Perez et al. 2018), so that what is looked for is decided early. The instruction is a bag of its
words and of their trigrams, hashed: any sentence is accepted, and a word never seen before shares
pieces with those that were.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a `SmallEncoder`.

    Attributes:
        image_size: Height and width of the picture, pixels; a multiple of 8.
        width: Width of the tokens.
        blocks: ConvNeXt blocks on the grid.
        buckets: Rows of the table of words and trigrams.
    """

    image_size: int = 128
    width: int = 128
    blocks: int = 4
    buckets: int = 4096

    def __post_init__(self) -> None:
        if self.image_size % 8:
            raise ValueError(f"image_size={self.image_size}: allowed are multiples of 8")


def hashed_pieces(text: str, buckets: int) -> list[int]:
    """Table rows of the words of a text and of their trigrams, never empty."""
    words = re.findall(r"[^\W_]+", text.lower())
    pieces = ["", *words]
    for word in words:
        marked = f"<{word}>"
        pieces += [marked[i : i + 3] for i in range(len(marked) - 2)]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces]


class TextEncoder(nn.Module):
    """Instructions as vectors `(B, width)`."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, width, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, instructions: Sequence[str]) -> Tensor:
        """Encodes `B` instructions."""
        pieces = [hashed_pieces(text, self.table.num_embeddings) for text in instructions]
        starts = [0]
        for row in pieces[:-1]:
            starts.append(starts[-1] + len(row))
        device = self.table.weight.device
        flat = torch.tensor([piece for row in pieces for piece in row], device=device)
        return self.mlp(self.table(flat, torch.tensor(starts, device=device)))


class _Block(nn.Module):
    """ConvNeXt block (Liu et al. 2022) with a scale and a shift from the instruction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.film = nn.Linear(width, 2 * width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        for layer in (self.film, self.shrink):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text)[:, None, None].chunk(2, dim=-1)
        y = self.norm(self.near(x).movedim(1, -1)) * (1 + scale) + shift
        return x + self.shrink(F.gelu(self.grow(y))).movedim(-1, 1)


class SmallEncoder(nn.Module):
    """A picture and an instruction as tokens; see the module docstring."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // 8
        self.text = TextEncoder(config.buckets, width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.blocks))
        self.position = nn.Parameter(torch.randn(side * side, width) * 0.2)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor, instructions: Sequence[str]) -> Tensor:
        """Tokens `(B, (H / 8)^2 + 1, width)`; the last one is the instruction.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            instructions: `B` sentences.
        """
        text = self.text(instructions)
        x = self.stem(images * 2 - 1)
        for block in self.blocks:
            x = block(x, text)
        grid = x.flatten(2).transpose(1, 2) + self.position
        return self.norm(torch.cat([grid, text[:, None]], dim=1))
