"""Products with a frozen matrix, as fast as the machine can.

With few rows, the CPU spends most of a product on bringing the matrix into the order its kernels
want. For a frozen matrix that can be done once: on two cores, 17 rows by the matrices of six of the
published layers take 19 instead of 42 ms in float32, 10 instead of 16 ms in bfloat16. The operators
are those that `torch.compile` puts into frozen graphs.

What a row becomes must not depend on how many there are. On a CPU it does where a library has
kernels of its own for a few rows, or, in bfloat16 on processors with matrix tiles, for many, which
add up in another order. Rows are therefore taken in blocks of `_LEAST` to `_MOST`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]
"""`(..., inputs)` to `(..., outputs)`."""

_ROWS = 16
_LEAST, _MOST = 4, {torch.bfloat16: 32}
"""Rows of a block; there is no most for other types."""


def product(weight: Tensor) -> Product:
    """The product with a frozen matrix `(outputs, inputs)`, without bias."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    linear = torch.ops.mkldnn._linear_pointwise

    def multiplied(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        found = _by_blocks(rows, lambda block: linear(block, packed, None, "none", [], ""))
        return found.view(*x.shape[:-1], -1)

    return multiplied


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices `(..., l, d)` and `(..., d, e)`, whose rows do not depend on `l`."""
    return a @ b if a.device.type != "cpu" else _by_blocks(a, lambda block: block @ b)


def _by_blocks(x: Tensor, function: Product) -> Tensor:
    """A function of rows `(..., l, d)`, block by block; where there are few with zeros below."""
    parts = []
    for block in x.split(_MOST.get(x.dtype, max(1, x.shape[-2])), dim=-2):
        count = block.shape[-2]
        if count < _LEAST:
            block = F.pad(block, (0, 0, 0, _LEAST - count))
        parts.append(function(block)[..., :count, :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
