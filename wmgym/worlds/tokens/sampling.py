"""Which token comes next: the likeliest, or a draw whose noise is a matter of its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from wmgym.worlds.tokens.noise import gumbel

Mode = Literal["greedy", "sample"]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        mode: "greedy", or "sample" from the softmax.
        top_p: Sampling keeps the likeliest tokens that together have at least this probability.
        temperature: Divides the logits.
        restricted: Only dynamics codes may follow. Otherwise, as released, any id may; ids that are
            no dynamics codes stay in the sequence and are drawn as the nearest code.
        seed: Of the noise, 0 ... 2**63 - 1.

    Raises:
        ValueError: A value outside of its range.
    """

    mode: Mode = "greedy"
    top_p: float = 0.8
    temperature: float = 1.0
    restricted: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}: allowed are {get_args(Mode)}")
        if not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise ValueError(
                f"top_p={self.top_p}, temperature={self.temperature}: allowed are (0, 1] and > 0"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: allowed are integers 0 ... 2**63 - 1")


GREEDY = Decoding()


def choose(logits: Tensor, decoding: Decoding, keys: Tensor) -> Tensor:
    """Next tokens `(B,)` of logits `(B, V)`; `keys` `(B,)` name the noise of rows and place."""
    if decoding.mode == "greedy":
        return logits.argmax(dim=-1)
    scaled = logits.float() / decoding.temperature
    if decoding.top_p < 1:
        ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, before >= decoding.top_p
        )
        scaled = scaled.masked_fill(beyond, -torch.inf)
    return (scaled + gumbel(keys, scaled.shape[1])).argmax(dim=-1)
