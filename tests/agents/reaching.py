"""Policies that an evaluation can import: one that reaches forward, one that returns nonsense."""

from __future__ import annotations

import numpy as np


class Reaching:
    def __init__(self, shape):
        self.shape = shape

    def reset(self, seed):
        pass

    def act(self, observation):
        actions = np.zeros(self.shape, np.float32)
        actions[..., 0] = 0.5
        return actions


def policy():
    return Reaching((1, 8, 7))


def wrong():
    return Reaching((7,))
