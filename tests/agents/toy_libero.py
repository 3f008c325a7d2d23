"""A stand-in for LIBERO's simulator: an episode is solved by pushing hard enough, or breaks off."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np

LIMIT = 24
BROKEN = 43


class ToyLibero:
    """Pushing takes a target, drawn from the episode's seed, within the step limit, or not."""

    pace = 0.0

    def __init__(self, *, tasks, action_chunk, image_size, **_):
        self.tasks = tasks or tuple(range(10))
        self.action_space = SimpleNamespace(shape=(action_chunk, 7) if action_chunk else (7,))
        self.image_size = image_size
        self.init_state_transform = None

    def reset(self, *, seed, options):
        perturbed = self.init_state_transform is not None and self.init_state_transform.objects
        if options.get("init_state") == BROKEN and perturbed:
            raise RuntimeError("no sound scene")
        rng = np.random.default_rng(seed)
        self.target, self.pushed, self.steps = 2 * 0.5 * LIMIT * rng.random(), 0.0, 0
        return self._seen()

    def step(self, action):
        time.sleep(self.pace)
        for row in np.reshape(action, (-1, 7)):
            self.pushed += row[0]
            self.steps += 1
            if self.pushed >= self.target or self.steps == LIMIT:
                break
        seen, info = self._seen()
        return seen, 0.0, info["success"], self.steps == LIMIT, info

    def _seen(self):
        size = (self.image_size, self.image_size, 3)
        seen = {
            "image": np.full(size, self.steps, np.uint8),
            "proprio": np.zeros(8, np.float32),
        }
        told = {
            "instruction": "push",
            "success": self.pushed >= self.target,
            "frame_index": self.steps,
        }
        return seen, told
