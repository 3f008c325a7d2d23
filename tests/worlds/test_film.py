"""Films of a world in training: recorded, imagined, difference."""

from __future__ import annotations

import numpy as np
import tiny
import torch

from wmgym.data import FrameCache
from wmgym.data.video import Clip, decode
from wmgym.worlds.film import film
from wmgym.worlds.world import Prediction

STEPS = 10


class Dimmer:
    """Imagines what it saw last at half the brightness, and remembers the actions."""

    def start(self, frames, proprio):
        assert frames.shape[1] == proprio.shape[1] == 2
        return frames[:, -1:]

    def step(self, frame, actions):
        self.actions = actions
        frames = 0.5 * frame.expand(-1, actions.shape[1], -1, -1, -1)
        return frame, Prediction(frames, torch.zeros(*actions.shape[:2], 8))


def cache_of(*lengths: int) -> FrameCache:
    episodes = [tiny.episode(i, length=length) for i, length in enumerate(lengths)]
    joined = {
        name: np.concatenate([getattr(e, attribute) for e in episodes])
        for name, attribute in (
            ("frames", "images"),
            ("proprio", "proprio"),
            ("actions", "actions"),
            ("clean_actions", "actions"),
        )
    }
    starts = np.cumsum([0, *lengths])
    return FrameCache(**joined, starts=starts, episodes=[e.info for e in episodes])


def test_a_film_shows_recorded_imagined_and_difference(tmp_path):
    cache = cache_of(24, 15, 30)
    world = Dimmer()
    film(world, cache, tmp_path / "film.mp4", episodes=4, steps=STEPS)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]
    pictures = decode(Clip(tmp_path / "film.mp4", 0.0, STEPS, 20), 0, STEPS)
    size = tiny.SIZE
    assert pictures.shape == (STEPS, 2 * size, 3 * size, 3)
    for row, first in enumerate((0 + 24 // 3, 39 + 30 // 3)):
        recorded = cache.frames[first + 1 : first + 1 + STEPS].astype(float)
        imagined = np.broadcast_to(0.5 * cache.frames[first], recorded.shape)
        expected = [recorded, imagined, np.abs(recorded - imagined)]
        shown = np.split(pictures[:, row * size : (row + 1) * size].astype(float), 3, axis=2)
        for one, other in zip(shown, expected, strict=True):
            assert np.abs(one - other).mean() < 8
        actions = cache.actions[first : first + STEPS]
        np.testing.assert_array_equal(world.actions[row], actions)


def test_without_long_episodes_there_is_no_film(tmp_path):
    film(Dimmer(), cache_of(20, 12), tmp_path / "film.mp4", steps=STEPS)
    assert list(tmp_path.iterdir()) == []
