"""Random numbers row by row, so that what a row gets does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Source = torch.Generator | Sequence[torch.Generator]
"""One generator on the CPU, read row after row, or one for each row."""


def rows(draw: Callable[..., Tensor], count: int, shape: Sequence[int], source: Source) -> Tensor:
    """Draws `(count, *shape)`.

    Args:
        draw: `torch.randn` or `torch.rand`.
        count: Rows.
        shape: Shape of a row.
        source: Where the numbers come from.

    Raises:
        ValueError: Another number of generators than rows.
    """
    sources = [source] * count if isinstance(source, torch.Generator) else source
    if len(sources) != count:
        raise ValueError(f"{len(sources)} generators for {count} rows: one or one each is needed")
    return torch.stack([draw(tuple(shape), generator=one) for one in sources])
