"""Eyes and ears of the small policy: a picture and an instruction as tokens.

Small enough to be trained from nothing on two CPU cores. The picture goes through the stages of a
residual network (He et al. 2016, pre-activation) down to a sixteenth of its size; every block is
modulated by the instruction (FiLM, Perez et al. 2018), so that what is looked for is decided early.
The instruction is a bag of its words and of their trigrams, hashed: any sentence is
accepted, and a word never seen before shares pieces with those that were.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a `SmallEncoder`.

    Attributes:
        image_size: Height and width of the picture, pixels.
        widths: Channels of the stages; the first sees a quarter of the size, each later one half of
            what the one before saw. The last is the width of the tokens.
        blocks: Residual blocks of the stages.
        buckets: Rows of the table of words and trigrams.
    """

    image_size: int = 128
    widths: tuple[int, ...] = (32, 96, 256)
    blocks: tuple[int, ...] = (1, 1, 2)
    buckets: int = 4096

    resizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.widths) or not self.widths:
            raise ValueError(f"blocks={self.blocks}: one number for each of widths={self.widths}")
        if any(width % _GROUPS for width in self.widths):
            raise ValueError(f"widths={self.widths}: allowed are multiples of {_GROUPS}")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size={self.image_size}: allowed are multiples of {self.stride}"
            )

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels from one token to the next."""
        return 2 ** (len(self.widths) + 1)

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> EncoderConfig:
        """The configuration that `dataclasses.asdict` made `shape` of."""
        rows = {name: tuple(shape[name]) for name in ("widths", "blocks")}
        return cls(**{**shape, **rows})


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
    """Pre-activation residual block with a scale and a shift from the instruction."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(text, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class SmallEncoder(nn.Module):
    """A picture and an instruction as tokens; see the module docstring."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.stride
        self.text = TextEncoder(config.buckets, width)
        self.entries, self.stages = nn.ModuleList(), nn.ModuleList()
        before = 3
        for number, (channels, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            kernel, stride, padding = (7, 4, 3) if number == 0 else (2, 2, 0)
            self.entries.append(nn.Conv2d(before, channels, kernel, stride, padding))
            self.stages.append(nn.ModuleList(_Block(channels, width) for _ in range(count)))
            before = channels
        self.position = nn.Parameter(torch.randn(side * side, width) * 0.2)
        self.norm = nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # twice as fast on a CPU
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor, instructions: Sequence[str]) -> Tensor:
        """Tokens `(B, (image_size / stride)^2 + 1, width)`; the last one is the instruction.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            instructions: `B` sentences.
        """
        text = self.text(instructions)
        x = images.contiguous(memory_format=torch.channels_last) * 2 - 1
        for entry, stage in zip(self.entries, self.stages, strict=True):
            x = entry(x)
            for block in stage.children():
                x = block(x, text)
        grid = x.flatten(2).transpose(1, 2) + self.position
        return self.norm(torch.cat([grid, text[:, None]], dim=1))
