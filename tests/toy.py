"""A deterministic toy world, and a dataset in memory: a square that actions move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wmgym.data.episodes import Episode, EpisodeInfo
from wmgym.worlds.world import Prediction, WorldState, select_rows

SIZE = (40, 40)
SPEED = 0.1


def draw_square(position: Tensor, brightness: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    """Frames `(..., 3, H, W)` of a soft square at `position (..., 2)` in [0, 1]."""
    height, width = size
    y = torch.linspace(0.0, 1.0, height).view(height, 1)
    x = torch.linspace(0.0, 1.0, width).view(1, width)
    px, py = position[..., 0, None, None], position[..., 1, None, None]
    distance = torch.maximum((x - px).abs(), (y - py).abs())
    square = (1.0 - 5.0 * distance).clamp(0.0, 1.0)
    background = brightness[..., None, None].expand_as(square)
    return torch.stack([square, background, 1.0 - square], -3)


@dataclass(frozen=True)
class ToyState(WorldState):
    position: Tensor
    brightness: Tensor
    step: Tensor


class ToyWorld:
    """Integrates the first two action dimensions; deterministic and exact in every row."""

    name = "toy"
    proprio_source = "integrated"

    def __init__(self, context: int = 2, success_at: float | None = None) -> None:
        self.image_size = SIZE
        self.context = context
        self.device = torch.device("cpu")
        self.success_at = success_at
        self.rows_stepped: list[int] = []

    def start(self, frames: Tensor, proprio: Tensor) -> ToyState:
        assert frames.shape[1:] == (self.context, 3, *SIZE)
        assert frames.dtype == torch.float32
        return ToyState(
            position=proprio[:, -1, :2].clone(),
            brightness=frames[:, 0, 1, 0, 0].clone(),
            step=torch.zeros(len(frames), dtype=torch.int64),
        )

    def step(self, state: ToyState, actions: Tensor) -> tuple[ToyState, Prediction]:
        self.rows_stepped.append(len(actions))
        position = state.position
        path = []
        for t in range(actions.shape[1]):
            position = (position + SPEED * actions[:, t, :2]).clamp(0.0, 1.0)
            path.append(position)
        track = torch.stack(path, 1)
        brightness = state.brightness[:, None].expand(track.shape[:2])
        proprio = torch.zeros(*track.shape[:2], 8)
        proprio[..., :2] = track
        success = None if self.success_at is None else track[..., 0] > self.success_at
        following = ToyState(position, state.brightness, state.step + actions.shape[1])
        return following, Prediction(draw_square(track, brightness), proprio, success)

    def select(self, state: ToyState, index: Tensor) -> ToyState:
        return select_rows(state, index)


class ToyDataset:
    """Episodes of random actions; the recorded square is 10 % slower than the imagined one."""

    def __init__(
        self, lengths: tuple[int, ...] = (20, 24, 18, 30), held_out: tuple[int, ...] = ()
    ) -> None:
        self.reads = 0
        self._steps = []
        self.episodes = []
        for i, length in enumerate(lengths):
            rng = np.random.default_rng(1000 + i)
            actions = rng.uniform(-1.0, 1.0, (length, 7)).astype(np.float32)
            moves = 0.9 * SPEED * actions[:, :2]
            track = np.clip(0.5 + np.vstack([np.zeros((1, 2)), np.cumsum(moves, 0)[:-1]]), 0, 1)
            proprio = np.zeros((length, 8), np.float32)
            proprio[:, :2] = track
            frames = draw_square(
                torch.from_numpy(track).float(), torch.full((length,), 0.1 * (i + 1))
            )
            images = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            self._steps.append((images, proprio, actions))
            self.episodes.append(
                EpisodeInfo(
                    episode_id=i,
                    length=length,
                    instruction=f"push the square along path {i}",
                    suite="libero_object",
                    task_id=i % 2,
                    init_state_id=40 if i in held_out else i,
                    success=True,
                )
            )

    def read(
        self, episode_id: int, start: int = 0, stop: int | None = None, *, wrist: bool = False
    ) -> Episode:
        self.reads += 1
        images, proprio, actions = (x[start:stop].copy() for x in self._steps[episode_id])
        return Episode(self.episodes[episode_id], start, images, proprio, actions)
