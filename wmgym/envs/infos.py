"""Infos in Gymnasium's vector form, written for many rows at once.

A key `k` of a vector info holds an array with one entry per environment, and `_k` the boolean mask
of the environments that have one; nested dictionaries recurse. Numbers and arrays are zero where
the mask is False, anything else is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def add_rows(
    infos: dict[str, Any], values: Mapping[str, Any], rows: NDArray[np.int64], num_envs: int
) -> None:
    """Writes `values` of the environments `rows` into vector infos, in place.

    Args:
        infos: Vector infos of `num_envs` environments, possibly empty.
        values: Per key an array or tensor `(len(rows), ...)`, or a nested mapping of them.
        rows: `(n,)` indices of environments.
        num_envs: Number of environments.
    """
    if len(rows) == 0:
        return
    for key, value in values.items():
        if isinstance(value, Mapping):
            add_rows(infos.setdefault(key, {}), value, rows, num_envs)
        else:
            if key not in infos:
                infos[key] = _empty(value, num_envs)
            infos[key][rows] = value
        infos.setdefault(f"_{key}", np.zeros(num_envs, np.bool_))[rows] = True


def take_row(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The info of one environment: numpy scalars as Python's, arrays and tensors as copies.

    What has no mask, as in the nested dictionaries of Gymnasium's wrappers, every row has.
    """
    single = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}")
        if key.startswith("_") or (mask is not None and not mask[row]):
            continue
        if isinstance(value, Mapping):
            single[key] = take_row(value, row)
        else:
            single[key] = take_value(value[row])
    return single


def take_value(value: Any) -> Any:
    """A copy of an entry: numpy scalars as Python's, 0-d tensors as Python's, arrays copied."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return value


def select_values(values: Mapping[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The entries of `values`, as `add_rows` takes them, where `mask` is True."""
    return {
        key: select_values(value, mask)
        if isinstance(value, Mapping)
        else value[torch.from_numpy(mask) if isinstance(value, torch.Tensor) else mask]
        for key, value in values.items()
    }


def _empty(value: Any, num_envs: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.new_zeros((num_envs, *value.shape[1:]))
    if value.dtype == object:
        return np.full((num_envs, *value.shape[1:]), None, dtype=object)
    return np.zeros((num_envs, *value.shape[1:]), value.dtype)
