"""Noise from counters: what is drawn follows from where it is drawn, not from what was before.

Every number is a hash of a key, a place in the sequence and a token. Rows that share a key draw the
same noise at the same place, whatever the batch: rollouts from one start under equal actions are
equal, and under similar ones stay together (common random numbers). The same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wrap(value: int) -> int:
    """An unsigned 64-bit number as torch holds it."""
    return value - 2**64 if value >= 2**63 else value


_STEP = _wrap(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_wrap(0xBF58476D1CE4E5B9), _wrap(0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), elementwise on int64."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _right(x, shift)) * multiplier
    return x ^ _right(x, 31)


def combine(key: Tensor, number: Tensor | int) -> Tensor:
    """A new key of a key and a number, elementwise."""
    if isinstance(number, int):  # without a copy from the host, which a graph could not capture
        number = torch.full((), number, dtype=torch.int64, device=key.device)
    return mix((key + _STEP) ^ mix(number * _STEP))


def keys_of(tokens: Tensor, seed: int) -> Tensor:
    """Keys `(B,)` of rows of tokens `(B, L)`, equal for equal rows."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    total = mix(combine(tokens.long(), places)).sum(dim=1)
    return combine(total, seed)


def uniform(keys: Tensor, count: int) -> Tensor:
    """Numbers `(B, count)` float32 in (0, 1) of keys `(B,)`."""
    bits = combine(keys[:, None], torch.arange(count, device=keys.device))
    numbers = (_right(bits, 40).float() + 0.5) / 2**24
    return numbers.clamp(max=1 - 2**-24)  # float32 rounds the largest up to 1


def gumbel(keys: Tensor, count: int) -> Tensor:
    """Gumbel noise `(B, count)` float32: the largest of `logits + noise` is a draw of softmax."""
    return -torch.log(-torch.log(uniform(keys, count)))


def _right(x: Tensor, by: int) -> Tensor:
    """Shift that fills with zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)
