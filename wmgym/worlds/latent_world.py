"""The small world: a context-conditioned tokenizer and frame-parallel latent dynamics.

`LatentWorldModel` is the network, `LatentWorld` runs it frozen behind the `World` protocol.

Exactness. A pass always covers the whole horizon with the actions so far, attention is causal, and
frames are drawn one by one from the context, so that a chunk asked for at once and step by step is
the same up to the rounding of the matrix products. Rows never mix, and all passes have equally
many: libraries choose by the shape in which order they sum.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wmgym.spaces import ACTION_DIM
from wmgym.worlds.dynamics import READINGS, DynamicsConfig, LatentDynamics
from wmgym.worlds.horizon_world import HorizonState, HorizonWorld
from wmgym.worlds.tokenizer import ContextTokenizer, Features, TokenizerConfig
from wmgym.worlds.world import DTYPES, Prediction, select_rows

_ROWS_ON_CPU, _ROWS_ELSEWHERE = 4, 16
"""Rows of a pass."""


@dataclass(frozen=True)
class LatentWorldConfig:
    """Shape of a `LatentWorldModel`.

    Attributes:
        tokenizer: Shape of the tokenizer.
        dynamics: Shape of the dynamics.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)


class LatentWorldModel(nn.Module):
    """Tokenizer and dynamics with their weights."""

    def __init__(self, config: LatentWorldConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = ContextTokenizer(config.tokenizer)
        self.dynamics = LatentDynamics(
            config.dynamics,
            width=config.tokenizer.width,
            slots=config.tokenizer.slots,
            latent=config.tokenizer.latent,
        )

    def imagine_last(
        self, frame: Tensor, proprio: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last frame `(B, 3, H, W)` of a chunk, and its last two readings `(B, 2, 8)`.

        Args:
            frame: `(B, 3, H, W)` context frame in [0, 1].
            proprio: `(B, 2, 8)` readings before and at the context frame.
            actions: `(B, T, 7)`, `1 <= T <= horizon`.
        """
        context = self.tokenizer.look(frame)
        latents, readings = self.dynamics(context.coarse, proprio, actions)
        pose = self.dynamics.pose(proprio[:, -1], readings[:, -1])
        drawn = self.tokenizer.decode(latents[:, -1], pose, context, frame)
        return drawn.clamp(0, 1), torch.cat([proprio, readings], 1)[:, -READINGS:]


@dataclass(frozen=True)
class LatentState(HorizonState):
    """Everything later steps depend on.

    Attributes:
        frame: `(B, 3, H, W)` context frame.
        fine: Its fine features.
        coarse: Its coarse features.
        proprio: `(B, 2, 8)` readings before and at the context frame.
        actions: `(B, L, 7)` actions since, zeros where none was taken yet.
        last_frame: `(B, 3, H, W)` the latest frame.
        last_proprio: `(B, 2, 8)` the latest two readings.
    """

    frame: Tensor
    fine: Tensor
    coarse: Tensor
    proprio: Tensor
    actions: Tensor
    last_frame: Tensor
    last_proprio: Tensor


def _half_products(model: LatentWorldModel) -> LatentWorldModel:
    """Stores the weights of matrix products in bfloat16, so that no step has to convert them."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    return model


class LatentWorld(HorizonWorld[LatentState]):
    """A frozen `LatentWorldModel` behind the `World` protocol.

    Args:
        model: The network.
        name: Name shown in reports and errors.
        device: Where to run it.
        dtype: `"float32"`, or `"bfloat16"` for the matrix products inside the networks.

    Raises:
        ValueError: Unknown dtype.
    """

    proprio_source = "learned"
    context = READINGS

    def __init__(
        self,
        model: LatentWorldModel,
        *,
        name: str,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: allowed are {sorted(DTYPES)}")
        size = model.config.tokenizer.image_size
        super().__init__(name, device, (size, size), model.config.dynamics.horizon)
        self._rows_per_pass = _ROWS_ON_CPU if self.device.type == "cpu" else _ROWS_ELSEWHERE
        self._autocast = dtype == "bfloat16"
        if self._autocast:
            model = _half_products(copy.deepcopy(model))
        self.model = model.to(self.device).eval().requires_grad_(False)

    def _anchor(self, frame: Tensor, proprio: Tensor) -> LatentState:
        batch = len(frame)
        proprio = proprio[:, [max(-READINGS, -proprio.shape[1]), -1]]
        features = self._look(frame)
        return LatentState(
            frame=frame,
            fine=features.fine,
            coarse=features.coarse,
            proprio=proprio,
            actions=frame.new_zeros(batch, self.horizon, ACTION_DIM),
            steps=torch.zeros(batch, dtype=torch.int64, device=self.device),
            last_frame=frame,
            last_proprio=proprio,
        )

    def _latest(self, state: LatentState) -> tuple[Tensor, Tensor]:
        return state.last_frame, state.last_proprio

    @torch.no_grad()
    def redraw(self, context: Tensor, frames: Tensor, proprio: Tensor) -> Tensor:
        """Frames as the tokenizer redraws them: the best the dynamics could do.

        Args:
            context: `(B, 3, H, W)` in [0, 1].
            frames: `(B, T, 3, H, W)` to describe and redraw.
            proprio: `(B, 1 + T, 8)` recorded at the context and at the frames.

        Returns:
            `(B, T, 3, H, W)` in [0, 1].
        """
        batch, count = frames.shape[:2]
        tokenizer = self.model.tokenizer
        proprio = proprio.to(self.device, torch.float32)
        context = context.to(self.device, torch.float32)
        seen = self._look(context).repeat(count)
        own = self._look(frames.to(self.device, torch.float32).flatten(0, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            drawn = tokenizer.decode(
                tokenizer.encode(own, seen),
                self._pose(proprio[:, 0], proprio[:, 1:]),
                seen,
                context.repeat_interleave(count, 0),
            )
        return drawn.clamp(0, 1).view(batch, count, *drawn.shape[1:])

    def _advance(
        self, state: LatentState, actions: Tensor, taken: int, every: int
    ) -> tuple[LatentState, Prediction]:
        until = taken + actions.shape[1]
        sofar = state.actions.clone()
        sofar[:, taken:until] = actions
        state = dataclasses.replace(state, actions=sofar)
        rows = torch.arange(len(state), device=self.device).split(self._rows_per_pass)
        parts = [self._predict(select_rows(state, some), taken, until, every) for some in rows]
        frames = torch.cat([p.frames for p in parts])
        proprio = torch.cat([p.proprio for p in parts])
        after = dataclasses.replace(
            state,
            steps=torch.full_like(state.steps, until),
            last_frame=frames[:, -1],
            last_proprio=torch.cat([state.last_proprio, proprio], 1)[:, -READINGS:],
        )
        return after, Prediction(frames=frames, proprio=proprio)

    def _predict(self, state: LatentState, taken: int, until: int, every: int) -> Prediction:
        """Proprioception of the steps `taken ... until`, frames after some of them."""
        batch = len(state)
        if batch < self._rows_per_pass:
            filled = self._predict(select_rows(state, self._filled(batch)), taken, until, every)
            return Prediction(filled.frames[:batch], filled.proprio[:batch])
        drawn = torch.arange(taken + every - 1, until, every, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            latents, proprio = self.model.dynamics(state.coarse, state.proprio, state.actions)
            latents = latents[:, drawn]
            count = latents.shape[1]
            frames = self.model.tokenizer.decode(
                latents.flatten(0, 1),
                self._pose(state.proprio[:, -1], proprio[:, drawn]),
                Features(state.fine, state.coarse).repeat(count),
                state.frame.repeat_interleave(count, 0),
            )
        return Prediction(
            frames=frames.clamp(0, 1).view(batch, count, *frames.shape[1:]),
            proprio=proprio[:, taken:until],
        )

    def _pose(self, before: Tensor, now: Tensor) -> Tensor:
        """Poses `(B T, 16)` from proprioception `(B, 8)` and `(B, T, 8)`."""
        count = now.shape[1]
        return self.model.dynamics.pose(before.repeat_interleave(count, 0), now.flatten(0, 1))

    def _filled(self, batch: int) -> Tensor:
        """Row numbers `0 ... batch - 1`, the last repeated until there are as many as needed."""
        full = -(-batch // self._rows_per_pass) * self._rows_per_pass
        return torch.arange(full, device=self.device).clamp(max=batch - 1)

    def _look(self, frames: Tensor) -> Features:
        batch = len(frames)
        if batch % self._rows_per_pass:
            filled = self._look(frames[self._filled(batch)])
            return Features(filled.fine[:batch], filled.coarse[:batch])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            parts = [self.model.tokenizer.look(part) for part in frames.split(self._rows_per_pass)]
        return Features(
            torch.cat([p.fine for p in parts]).float(), torch.cat([p.coarse for p in parts]).float()
        )
