"""The small world: a context-conditioned tokenizer and frame-parallel latent dynamics.

`LatentWorldModel` is the network, `LatentWorld` runs it frozen behind the `World` protocol. Up to
`horizon` control steps are imagined from one real frame; after that the last imagined frame takes
its place, and so on for as long as one likes.

Exactness. A pass always covers the whole horizon with the actions so far, attention is causal, and
frames are drawn one by one from the context, so that a chunk asked for at once and step by step is
the same up to the rounding of the matrix products. Rows never mix, and those that are at different
steps are computed apart. Rows are filled up to a multiple of four: float32 matrix products of the
library on a CPU sum in the same order for any such number of rows, with one thread or with many,
and in another for a few rows that are not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wmgym.spaces import ACTION_DIM, PROPRIO_DIM
from wmgym.worlds.dynamics import READINGS, DynamicsConfig, LatentDynamics
from wmgym.worlds.tokenizer import ContextTokenizer, Features, TokenizerConfig
from wmgym.worlds.world import DTYPES, Prediction, WorldState, select_rows

_ROWS_PER_PASS = 16
_ROWS_FILLED_TO = 4


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
class LatentState(WorldState):
    """Everything later steps depend on.

    Attributes:
        frame: `(B, 3, H, W)` context frame.
        fine: Its fine features.
        coarse: Its coarse features.
        proprio: `(B, 2, 8)` readings before and at the context frame.
        actions: `(B, L, 7)` actions since, zeros where none was taken yet.
        steps: `(B,)` int64, how many were taken.
        last_frame: `(B, 3, H, W)` the latest frame.
        last_proprio: `(B, 2, 8)` the latest two readings.
    """

    frame: Tensor
    fine: Tensor
    coarse: Tensor
    proprio: Tensor
    actions: Tensor
    steps: Tensor
    last_frame: Tensor
    last_proprio: Tensor


def _half_products(model: LatentWorldModel) -> LatentWorldModel:
    """Stores the weights of matrix products in bfloat16, so that no step has to convert them."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    return model


class LatentWorld:
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
        self.name = name
        self.device = torch.device(device)
        self._autocast = dtype == "bfloat16"
        if self._autocast:
            model = _half_products(copy.deepcopy(model))
        self.model = model.to(self.device).eval().requires_grad_(False)
        size = model.config.tokenizer.image_size
        self.image_size = (size, size)
        self.horizon = model.config.dynamics.horizon

    @torch.no_grad()
    def start(self, frames: Tensor, proprio: Tensor) -> LatentState:
        """State at the last of the context frames `(B, C, 3, H, W)` and readings `(B, C, 8)`."""
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
        readings = proprio.to(self.device, torch.float32)
        readings = torch.stack(
            [readings[:, max(-READINGS, -readings.shape[1])], readings[:, -1]], 1
        )
        return self._anchor(frame, readings)

    def _anchor(self, frame: Tensor, proprio: Tensor) -> LatentState:
        batch = len(frame)
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

    @torch.no_grad()
    def step(
        self, state: LatentState, actions: Tensor, every: int = 1
    ) -> tuple[LatentState, Prediction]:
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
        joined = {
            name: torch.cat([part.tensors()[name] for part, _ in parts])[back]
            for name in state.tensors()
        }
        return LatentState(**joined), Prediction(
            frames=torch.cat([p.frames for _, p in parts])[back],
            proprio=torch.cat([p.proprio for _, p in parts])[back],
        )

    def _step_together(
        self, state: LatentState, actions: Tensor, every: int
    ) -> tuple[LatentState, Prediction]:
        """Steps rows that have taken equally many steps, so that all need a new context at once."""
        predictions: list[Prediction] = []
        taken, done = int(state.steps[0]), 0
        while done < actions.shape[1]:
            if taken == self.horizon:
                state, taken = self._anchor(state.last_frame, state.last_proprio), 0
            now = actions[:, done : done + self.horizon - taken]
            state, prediction = self._advance(state, now, every)
            predictions.append(prediction)
            done, taken = done + now.shape[1], taken + now.shape[1]
        return state, Prediction(
            frames=torch.cat([p.frames for p in predictions], 1),
            proprio=torch.cat([p.proprio for p in predictions], 1),
        )

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

    def select(self, state: LatentState, index: Tensor) -> LatentState:
        """Rows `index` `(N,)` of a state, repeats allowed."""
        return select_rows(state, index)

    def _advance(
        self, state: LatentState, actions: Tensor, every: int
    ) -> tuple[LatentState, Prediction]:
        """`T` steps that fit into every row's horizon."""
        batch, count, _ = actions.shape
        slots = state.steps[:, None] + torch.arange(count, device=self.device)
        taken = state.actions.scatter(1, slots[:, :, None].expand(-1, -1, ACTION_DIM), actions)
        parts = [
            self._predict(select_rows(state, rows), taken[rows], slots[rows], every)
            for rows in torch.arange(batch, device=self.device).split(_ROWS_PER_PASS)
        ]
        frames = torch.cat([p.frames for p in parts])
        proprio = torch.cat([p.proprio for p in parts])
        readings = torch.cat([state.last_proprio, proprio], 1)[:, -READINGS:]
        advanced = LatentState(
            frame=state.frame,
            fine=state.fine,
            coarse=state.coarse,
            proprio=state.proprio,
            actions=taken,
            steps=state.steps + count,
            last_frame=frames[:, -1],
            last_proprio=readings,
        )
        return advanced, Prediction(frames=frames, proprio=proprio)

    def _predict(
        self, state: LatentState, actions: Tensor, slots: Tensor, every: int
    ) -> Prediction:
        """Proprioception after the actions in `slots` `(b, T)`, frames after some of them."""
        batch, drawn = len(slots), slots[:, every - 1 :: every]
        count = drawn.shape[1]
        if batch % _ROWS_FILLED_TO:
            rows = self._filled(batch)
            filled = self._predict(select_rows(state, rows), actions[rows], slots[rows], every)
            return Prediction(filled.frames[:batch], filled.proprio[:batch])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            latents, proprio = self.model.dynamics(state.coarse, state.proprio, actions)
            rows = torch.arange(batch, device=self.device)[:, None]
            frames = self.model.tokenizer.decode(
                latents[rows, drawn].flatten(0, 1),
                self._pose(state.proprio[:, -1], proprio[rows, drawn]),
                Features(state.fine, state.coarse).repeat(count),
                state.frame.repeat_interleave(count, 0),
            )
        return Prediction(
            frames=frames.clamp(0, 1).view(batch, count, *frames.shape[1:]),
            proprio=proprio[rows, slots],
        )

    def _pose(self, before: Tensor, now: Tensor) -> Tensor:
        """Poses `(B T, 16)` from proprioception `(B, 8)` and `(B, T, 8)`."""
        count = now.shape[1]
        return self.model.dynamics.pose(before.repeat_interleave(count, 0), now.flatten(0, 1))

    def _filled(self, batch: int) -> Tensor:
        """Row numbers `0 ... batch - 1`, the last repeated up to a multiple of four."""
        full = -(-batch // _ROWS_FILLED_TO) * _ROWS_FILLED_TO
        return torch.arange(full, device=self.device).clamp(max=batch - 1)

    def _look(self, frames: Tensor) -> Features:
        batch = len(frames)
        if batch % _ROWS_FILLED_TO:
            filled = self._look(frames[self._filled(batch)])
            return Features(filled.fine[:batch], filled.coarse[:batch])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            parts = [self.model.tokenizer.look(part) for part in frames.split(_ROWS_PER_PASS)]
        return Features(
            torch.cat([p.fine for p in parts]).float(), torch.cat([p.coarse for p in parts]).float()
        )
