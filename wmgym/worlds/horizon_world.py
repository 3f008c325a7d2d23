"""A world that imagines up to `horizon` control steps from one context frame.

After that the last imagined frame takes the context's place, and so on for as long as one likes.
Rows that have taken different numbers of steps are advanced apart, since they need a new context at
different times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from wmgym.spaces import ACTION_DIM, PROPRIO_DIM
from wmgym.worlds.world import Prediction, WorldState, cat_rows, select_rows


@dataclass(frozen=True)
class HorizonState(WorldState):
    """Base of the states of such worlds.

    Attributes:
        steps: `(B,)` int64, how many were taken since the context frame.
    """

    steps: Tensor


HorizonStateT = TypeVar("HorizonStateT", bound=HorizonState)


class HorizonWorld(ABC, Generic[HorizonStateT]):
    """`start`, `step` and `select` of `World`, of what imagines within a horizon.

    Args:
        name: Name shown in reports and errors.
        device: Where it runs.
        image_size: `(H, W)` in pixels.
        horizon: Control steps imagined from one context.
    """

    context: int
    proprio_source: str

    def __init__(
        self, name: str, device: str | torch.device, image_size: tuple[int, int], horizon: int
    ) -> None:
        self.name, self.device = name, torch.device(device)
        self.image_size, self.horizon = image_size, horizon

    @abstractmethod
    def _anchor(self, frame: Tensor, proprio: Tensor) -> HorizonStateT:
        """State at a context frame `(B, 3, H, W)` with the readings `(B, C, 8)` up to it."""

    @abstractmethod
    def _latest(self, state: HorizonStateT) -> tuple[Tensor, Tensor]:
        """The latest frame and readings, as `_anchor` takes them."""

    @abstractmethod
    def _advance(
        self, state: HorizonStateT, actions: Tensor, taken: int, every: int
    ) -> tuple[HorizonStateT, Prediction]:
        """Steps within the horizon, of rows that all have taken `taken`."""

    @torch.no_grad()
    def start(self, frames: Tensor, proprio: Tensor) -> HorizonStateT:
        """State at the last of the context frames `(B, C, 3, H, W)` and readings `(B, C, 8)`.

        Raises:
            ValueError: Shapes do not fit.
        """
        expected = (3, *self.image_size)
        if frames.ndim != 5 or tuple(frames.shape[2:]) != expected or frames.shape[1] < 1:
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}, expected (B, C, *{expected}), C >= 1"
            )
        if proprio.shape != (*frames.shape[:2], PROPRIO_DIM):
            raise ValueError(
                f"proprio has shape {tuple(proprio.shape)}, frames {tuple(frames.shape)}: "
                f"expected (B, C, {PROPRIO_DIM}) with their B and C"
            )
        frame = frames[:, -1].to(self.device, torch.float32)
        return self._anchor(frame, proprio.to(self.device, torch.float32))

    @torch.no_grad()
    def step(
        self, state: HorizonStateT, actions: Tensor, every: int = 1
    ) -> tuple[HorizonStateT, Prediction]:
        """Advances every row by `T` control steps, `actions` `(B, T, 7)`; see `World.step`.

        Raises:
            ValueError: Shapes do not fit, or `every` would leave out a frame that is needed later.
        """
        expected = (len(state), *actions.shape[1:2], ACTION_DIM)
        if actions.shape != expected or actions.shape[1] < 1:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, "
                f"expected ({len(state)}, T, {ACTION_DIM}), T >= 1"
            )
        if actions.shape[1] % every or self.horizon % every or bool((state.steps % every).any()):
            raise ValueError(
                f"every={every}: the {actions.shape[1]} steps, those taken before and the horizon "
                f"of {self.horizon} must be multiples of it"
            )
        actions = actions.to(self.device, torch.float32)
        groups = [(state.steps == k).nonzero()[:, 0] for k in state.steps.unique()]
        if len(groups) == 1:
            return self._step_together(state, actions, every)
        parts = [
            self._step_together(select_rows(state, rows), actions[rows], every) for rows in groups
        ]
        back = torch.cat(groups).argsort()
        after = cat_rows([part for part, _ in parts])
        return select_rows(after, back), Prediction(
            frames=torch.cat([p.frames for _, p in parts])[back],
            proprio=torch.cat([p.proprio for _, p in parts])[back],
        )

    def select(self, state: HorizonStateT, index: Tensor) -> HorizonStateT:
        """Rows `index` `(N,)` of a state, repeats allowed."""
        return select_rows(state, index)

    def _step_together(
        self, state: HorizonStateT, actions: Tensor, every: int
    ) -> tuple[HorizonStateT, Prediction]:
        """Steps rows that have taken equally many steps, so that all need a new context at once."""
        predictions: list[Prediction] = []
        taken, done = int(state.steps[0]), 0
        while done < actions.shape[1]:
            if taken == self.horizon:
                state, taken = self._anchor(*self._latest(state)), 0
            now = actions[:, done : done + self.horizon - taken]
            state, prediction = self._advance(state, now, taken, every)
            predictions.append(prediction)
            done, taken = done + now.shape[1], taken + now.shape[1]
        if len(predictions) == 1:
            return state, predictions[0]
        return state, Prediction(
            frames=torch.cat([p.frames for p in predictions], 1),
            proprio=torch.cat([p.proprio for p in predictions], 1),
        )
