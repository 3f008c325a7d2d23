"""Results that do not depend on the batch size: work in batches of one fixed size.

Convolution and reduction kernels may sum in another order when the number of rows changes, which
moves results in the last bits. Here a function of `N` rows is applied to slices of exactly `size`
rows, the last one filled up by repeating its final row, so that the kernels always see one shape
and what a row yields depends on nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_fixed_batches(function: Callable[..., Tensor], size: int, *inputs: Tensor) -> Tensor:
    """Applies a row-wise function to slices of exactly `size` rows.

    Args:
        function: Takes one slice `(size, ...)` of every input and returns `(size, ...)`.
        size: Rows per slice, >= 1.
        *inputs: Tensors `(N, ...)` with the same `N` >= 1.

    Returns:
        `(N, ...)`: the rows of the results, in order. Differentiable if `function` is.

    Raises:
        ValueError: No rows, or inputs with different numbers of rows.
    """
    counts = [len(tensor) for tensor in inputs]
    if counts[0] < 1 or len(set(counts)) > 1:
        raise ValueError(f"inputs have {counts} rows: all need the same number, at least 1")
    results = []
    for begin in range(0, counts[0], size):
        count = min(size, counts[0] - begin)
        slices = [_fill_up(tensor[begin : begin + size], size) for tensor in inputs]
        results.append(function(*slices)[:count])
    return results[0] if len(results) == 1 else torch.cat(results)


def _fill_up(rows: Tensor, size: int) -> Tensor:
    missing = size - len(rows)
    if missing == 0:
        return rows
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
