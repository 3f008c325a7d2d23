"""Policies that an evaluation can import: one that reaches forward, and many that are none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import small
import torch


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


class Fickle(Reaching):
    """Pushes only from its second episode on, whatever its seed."""

    begun = 0

    def reset(self, seed):
        self.begun += 1

    def act(self, observation):
        return super().act(observation) * (self.begun > 1)


def fickle():
    return Fickle((1, 8, 7))


class Learner(Reaching):
    def act(self, observation):
        return torch.tensor(super().act(observation), requires_grad=True)


def learner():
    return Learner((1, 8, 7))


class Talking(Reaching):
    def act(self, observation):
        return ["forward", "please"]


def talking():
    return Talking((1, 8, 7))


def nothing():
    return None


def only_acts():
    return SimpleNamespace(act=None, reset=print)


def flow():
    return small.policy()


def broken():
    raise KeyError("my own mistake")


class Stumbling(Reaching):
    def act(self, observation):
        raise KeyError("my own mistake")


def stumbling():
    return Stumbling((1, 8, 7))


def dizzy():
    policy = Reaching((1, 8, 7))
    policy.act = lambda observation: np.full((1, 8, 7), np.nan)
    return policy
