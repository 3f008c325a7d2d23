"""The reference branch of R3: what the world imagines under the recorded actions.

Each group has one branch, shared by its members. It is advanced with them, as one more row of the
same pass of the world and from the same start state, so that a member that repeats the recorded
actions goes through the very same computation and its distance is exactly 0. Beyond the first chunk
the branch continues from its own imagined state.

Since the world is frozen, a chunk of a branch depends only on `(episode, frame, elapsed steps)`: it
is cached with the state after it and its perceptual features, and a start that comes up again costs
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from wmgym.cache import ByteCache
from wmgym.rewards.verified import Reference
from wmgym.worlds.world import (
    Prediction,
    World,
    WorldState,
    cat_rows,
    cat_tensors,
    step_world,
)

Rows: TypeAlias = tuple[WorldState, Tensor]
"""A state and the actions `(B, T, 7)` that follow."""


@dataclass(frozen=True)
class BranchChunk:
    """One chunk of `n` branches.

    Attributes:
        state: The world after the chunk, rows `n`.
        reference: The imagined frames `(n, T, 3, H, W)` with their perceptual features.
    """

    state: WorldState
    reference: Reference


class ReferenceBranches:
    """Advances reference branches, each chunk computed once.

    Args:
        world: The frozen world.
        encode: Turns frames `(n, T, 3, H, W)` into what the reward compares with.
        cache: Keeps chunks of branches.
        every: Control steps between the frames that are compared.
    """

    def __init__(
        self, world: World, encode: Callable[[Tensor], Reference], cache: ByteCache, every: int = 1
    ) -> None:
        self._world = world
        self._every = every
        self._encode = encode
        self._cache = cache

    def advance(
        self,
        members: Rows,
        branches: Rows,
        keys: Sequence[tuple[int, int, int]],
    ) -> tuple[WorldState, Prediction, BranchChunk]:
        """One chunk further, members and those branches that are not known yet in one go.

        Args:
            members: State and actions `(B, T, 7)` of the members.
            branches: The same of the `n` branches, with the recorded actions.
            keys: `n` times `(episode_id, frame_index, elapsed steps)`.

        Returns:
            The members' state and what they see, and the branches' chunk.
        """
        names = [("branch", *key) for key in keys]
        found: list[BranchChunk | None] = [self._cache.get(name) for name in names]
        missing = [i for i, chunk in enumerate(found) if chunk is None]
        state, actions = members
        count = len(actions)
        if missing:
            index = torch.tensor(missing, device=actions.device)
            state = cat_rows([state, self._world.select(branches[0], index)])
            actions = torch.cat([actions, branches[1][index]])
        after, seen = step_world(self._world, state, actions, self._every)
        if not missing:
            return after, seen, _join(found)
        rows = torch.arange(len(actions), device=actions.device)
        fresh = BranchChunk(
            self._world.select(after, rows[count:]), self._encode(seen.frames[count:])
        )
        for j, i in enumerate(missing):
            found[i] = chunk = _row(fresh, j)
            self._cache.put(names[i], chunk, _nbytes(chunk))
        after = self._world.select(after, rows[:count])
        return after, _map_tensors(lambda x: x[:count], [seen]), _join(found)


def _row(chunk: BranchChunk, row: int) -> BranchChunk:
    """One branch in memory of its own, so that keeping it keeps nothing else."""
    return _map_tensors(lambda x: x[row : row + 1].clone(), [chunk])


def _join(chunks: Sequence[BranchChunk | None]) -> BranchChunk:
    return _map_tensors(lambda *x: cat_tensors(x), [c for c in chunks if c is not None])


def _nbytes(chunk: BranchChunk) -> int:
    sizes: list[int] = []
    _map_tensors(lambda x: sizes.append(x.nbytes), [chunk])
    return sum(sizes)


def _map_tensors(function: Callable[..., Any], trees: Sequence[Any]) -> Any:
    """Applies a function to the corresponding tensors of nested dataclasses of one structure."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if not dataclasses.is_dataclass(first):
        return first
    names = [f.name for f in dataclasses.fields(first)]
    parts = {n: _map_tensors(function, [getattr(tree, n) for tree in trees]) for n in names}
    return cast("type[Any]", type(first))(**parts)
