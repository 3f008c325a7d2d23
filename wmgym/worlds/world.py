"""What the environment asks of a world model: start, step, select.

A `World` is a frozen simulator of a robot's camera. Its state is explicit: every tensor a later
step depends on is in the `WorldState` that `start` and `step` return, one row per environment, so
forking, reordering and restoring rows is plain indexing and exact. Rows are independent: what a row
yields never depends on its neighbours or on how many there are, and rows may be at different steps.

Shapes: `B` rows, `C` context frames, `T` control steps, images `(..., 3, H, W)` float32 in [0, 1],
proprioception `(..., 8)` as in `wmgym.spaces`, actions `(..., 7)` in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Arithmetic that the networks of worlds and rewards run in, by name."""


@dataclass(frozen=True)
class WorldState:
    """Base of every world's state: a frozen dataclass whose fields are tensors `(B, ...)`."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __len__(self) -> int:
        """Number of rows `B`."""
        return len(next(iter(self.tensors().values())))


StateT = TypeVar("StateT", bound=WorldState)
"""A world's own type of state."""


@dataclass(frozen=True)
class Prediction:
    """What a world imagines for `T` control steps.

    Attributes:
        frames: `(B, T, 3, H, W)` float32 in [0, 1]; frame `t` follows action `t`. Where only every
            `n`-th was asked for, `(B, T / n, 3, H, W)`.
        proprio: `(B, T, 8)` float32, in the units of `wmgym.spaces`.
        success: `(B, T)` bool if the world predicts task success, else None.
    """

    frames: Tensor
    proprio: Tensor
    success: Tensor | None = None


@runtime_checkable
class World(Protocol[StateT]):
    """A frozen world model.

    Attributes:
        name: Name shown in reports and errors.
        image_size: `(H, W)` in pixels.
        context: Number `C` of past frames and proprioceptive readings that `start` uses, >= 1.
        proprio_source: How proprioception is obtained, e.g. `"learned"` or `"integrated"`.
        device: Where its tensors live.
    """

    name: str
    image_size: tuple[int, int]
    context: int
    proprio_source: str
    device: torch.device

    def start(self, frames: Tensor, proprio: Tensor) -> StateT:
        """State at the last context frame.

        Args:
            frames: `(B, C, 3, H, W)` float in [0, 1], oldest first.
            proprio: `(B, C, 8)`.
        """
        ...

    def step(self, state: StateT, actions: Tensor) -> tuple[StateT, Prediction]:
        """Advances every row by `T` control steps.

        A world that can leave out frames takes a third argument, `every`, and returns those after
        every so many actions alone; the state after is the same.

        Args:
            state: What `start`, `step` or `select` returned.
            actions: `(B, T, 7)` in [-1, 1].
        """
        ...

    def select(self, state: StateT, index: Tensor) -> StateT:
        """Rows `index` `(N,)` of a state, repeats allowed."""
        ...


def step_world(
    world: World[StateT], state: StateT, actions: Tensor, every: int
) -> tuple[StateT, Prediction]:
    """`world.step`, with the frames after every so many actions: those alone, if it can."""
    if every == 1:
        return world.step(state, actions)
    if "every" in inspect.signature(world.step).parameters:
        return world.step(state, actions, every=every)  # type: ignore[call-arg]
    after, seen = world.step(state, actions)
    return after, dataclasses.replace(seen, frames=seen.frames[:, every - 1 :: every])


def select_rows(state: StateT, index: Tensor) -> StateT:
    """Rows `index` `(N,)` (int64) of a state, as new tensors."""
    return dataclasses.replace(
        state, **{k: v.index_select(0, index.to(v.device)) for k, v in state.tensors().items()}
    )


def cat_rows(states: Sequence[StateT]) -> StateT:
    """States one below the other.

    A tensor whose second axis is a length that differs, such as a memory of past tokens, is filled
    up with zeros to the longest.
    """
    if len(states) == 1:
        return states[0]
    names = states[0].tensors()
    return dataclasses.replace(
        states[0], **{name: cat_tensors([s.tensors()[name] for s in states]) for name in names}
    )


def cat_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` over rows, second axes of different length filled up with zeros."""
    lengths = [t.shape[1] if t.ndim > 1 else 0 for t in tensors]
    if len(set(lengths)) == 1:
        return torch.cat(list(tensors))
    longest = tensors[lengths.index(max(lengths))]
    filled = []
    for tensor in tensors:
        wide = longest.new_zeros(len(tensor), *longest.shape[1:])
        if tensor.shape[1]:
            wide[:, : tensor.shape[1]] = tensor
        filled.append(wide)
    return torch.cat(filled)


def replace_rows(state: StateT, rows: Tensor, source: StateT) -> StateT:
    """A copy of `state` in which row `rows[i]` is row `i` of `source`."""
    both = cat_rows([state, source])
    index = torch.arange(len(state))
    index[rows.cpu()] = torch.arange(len(source)) + len(state)
    return select_rows(both, index)
