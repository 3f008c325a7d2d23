"""What a caller may ask for: sizes, modes, seeds, rows, starts. Validation only.

Rows of a group share one start and its random stream, so requests are made per row, in Gymnasium's
form, and read per group: a group takes the seed of its first row, and a mask or a start must be the
same for all of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.state import EnvState
from wmgym.spaces import check_integer

OPTIONS = ("episode_id", "frame_index", "reset_mask")
SETTINGS = (
    "num_envs",
    "group_size",
    "horizon",
    "action_chunk",
    "reward_every",
    "world",
    "dataset",
    "references",
    "reference_actions",
)
"""What a snapshot must agree in with the environment that restores it."""


def check_sizes(
    num_envs: int,
    group_size: int,
    horizon: int,
    max_episode_steps: int | None,
    cache_mb: float,
    reward_every: int,
    chunk: int,
) -> None:
    """Validates the numbers an environment is made with.

    Raises:
        ValueError: One is no integer or too small, or no multiple of what it must be one of.
    """
    check_integer("num_envs", num_envs)
    check_integer("group_size", group_size)
    check_integer("horizon", horizon)
    check_integer("max_episode_steps", 1 if max_episode_steps is None else max_episode_steps)
    if num_envs % group_size:
        raise ValueError(
            f"num_envs={num_envs}, group_size={group_size}: num_envs must be a multiple of "
            "group_size"
        )
    check_integer("reward_every", reward_every)
    if chunk % reward_every or horizon % reward_every:
        raise ValueError(
            f"reward_every={reward_every}: action_chunk={chunk} and horizon={horizon} must be "
            "multiples of it"
        )
    if not isinstance(cache_mb, Real) or not 0 <= cache_mb < math.inf:
        raise ValueError(f"cache_mb={cache_mb!r}: expected a number of megabytes >= 0")


def parse_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode itself or by its value, e.g. "NextStep".

    Raises:
        ValueError: Unknown name.
    """
    try:
        return AutoresetMode(mode)
    except ValueError:
        allowed = ", ".join(repr(m.value) for m in AutoresetMode)
        raise ValueError(f"autoreset_mode={mode!r}: allowed are {allowed}") from None


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of `options`, `{}` for None.

    Raises:
        ValueError: An unknown key, or a frame without its episode.
    """
    request = dict(options or {})
    unknown = sorted(set(request) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown reset options {unknown}: allowed are {list(OPTIONS)}")
    if "frame_index" in request and "episode_id" not in request:
        raise ValueError("options['frame_index'] needs options['episode_id'] beside it")
    return request


def group_seeds(
    seed: int | Sequence[int | None] | None, num_envs: int, group_size: int
) -> list[int | None]:
    """The seed of each group; row `i` has seed `seed + i` if `seed` is one number.

    Raises:
        ValueError: A list whose length is not `num_envs`.
    """
    if seed is None:
        return [None] * (num_envs // group_size)
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + i for i in range(0, num_envs, group_size)]
    if len(seed) != num_envs:
        raise ValueError(f"seed has {len(seed)} entries, expected num_envs={num_envs} of them")
    return list(seed[::group_size])


def masked_groups(mask: Any, num_envs: int, group_size: int) -> NDArray[np.int64]:
    """The groups that `options["reset_mask"]` selects; all of them for None.

    Raises:
        TypeError: Not a boolean array or tensor.
        ValueError: Wrong shape, no True, or a part of a group.
    """
    if mask is None:
        return np.arange(num_envs // group_size)
    if isinstance(mask, Tensor):
        mask = mask.cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        given = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray) else f"{type(mask)}"
        raise TypeError(f"options['reset_mask'] must be an array or tensor of bool, got {given}")
    if mask.shape != (num_envs,):
        raise ValueError(f"options['reset_mask'] has shape {mask.shape}, expected ({num_envs},)")
    if not mask.any():
        raise ValueError("options['reset_mask'] must have at least one True entry")
    groups = mask.reshape(-1, group_size)
    partial = np.flatnonzero(groups.any(1) != groups.all(1))
    if partial.size:
        raise ValueError(
            f"options['reset_mask'] selects a part of groups {partial.tolist()}: the {group_size} "
            "rows of a group share one start, so all or none of them must be True"
        )
    return np.flatnonzero(groups[:, 0])


def group_option(
    request: dict[str, Any], key: str, groups: NDArray[np.int64], num_envs: int, group_size: int
) -> list[int] | list[None]:
    """An integer option, given once or per environment, for each of `groups`; Nones if not given.

    Raises:
        TypeError: Not integers.
        ValueError: Wrong shape, or rows of one group differ.
    """
    if key not in request:
        return [None] * len(groups)
    values = np.asarray(request[key])
    if values.dtype.kind not in "iu":
        raise TypeError(f"options['{key}']={request[key]!r}: expected integers")
    if values.shape not in ((), (num_envs,)):
        raise ValueError(
            f"options['{key}'] has shape {values.shape}, expected a number or ({num_envs},)"
        )
    rows = np.broadcast_to(values, (num_envs,)).reshape(-1, group_size)[groups]
    if (rows != rows[:, :1]).any():
        raise ValueError(f"options['{key}'] differs within a group of {group_size} rows")
    return rows[:, 0].tolist()


def fork_targets(
    source: int, rows: Sequence[int] | NDArray, num_envs: int, group_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The groups and sorted rows that become copies of row `source`.

    Raises:
        TypeError: Rows are not integers.
        ValueError: No such rows, or a part of a group that is not the source's.
    """
    to = np.unique(np.asarray(rows))
    if to.dtype.kind not in "iu":
        raise TypeError(f"rows={rows!r}: expected integers; of a mask give np.flatnonzero(mask)")
    check_integer("source", source, 0)
    if to.size == 0 or min(to[0], source) < 0 or max(to[-1], source) >= num_envs:
        raise ValueError(f"source={source}, rows={list(rows)}: rows are 0 to {num_envs - 1}")
    groups, counts = np.unique(to // group_size, return_counts=True)
    partial = groups[(counts < group_size) & (groups != source // group_size)]
    if partial.size:
        raise ValueError(
            f"rows={list(rows)} hold a part of groups {partial.tolist()}: the {group_size} rows "
            "of a group share one start, so fork all or none of them"
        )
    return groups, to


def check_snapshot(state: EnvState, own: tuple[Any, ...]) -> None:
    """Validates that a snapshot is of an environment with the same `SETTINGS`.

    Raises:
        TypeError: Not a snapshot.
        ValueError: It differs in some; the message has both values.
    """
    if not isinstance(state, EnvState):
        raise TypeError(f"state={state!r}: expected what get_state() returned")
    pairs = zip(SETTINGS, state.settings, own, strict=True)
    differing = [f"{k} is {a!r} in the snapshot and {b!r} here" for k, a, b in pairs if a != b]
    if differing:
        raise ValueError(f"the snapshot is of another environment: {'; '.join(differing)}")
