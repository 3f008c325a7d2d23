"""From a reward's name to rewards of imagined chunks.

R1 looks at actions alone. R2 and R3 measure a distance between the imagined frames and a reference:
the recorded frames, or those the same world imagines under the recorded actions. A function may
look at everything. What a reward does not look at is neither rolled out nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.rewards.perceptual import BACKBONES, LPIPS
from wmgym.rewards.verified import (
    Reference,
    RewardWeights,
    action_reward,
    encode_reference,
    frame_reward,
)


@dataclass(frozen=True)
class RewardInputs:
    """One chunk of `n` environments, on the world's device; frames `(n, F, 3, H, W)` in [0, 1].

    `F` is `T`, or `T / reward_every` where the environment rewards only some frames.

    Attributes:
        frames: Imagined frames; frame `t` follows action `t`, or the last of its `reward_every`.
        proprio: `(n, T, 8)` imagined.
        actions: `(n, T, 7)` given.
        reference_actions: `(n, T, 7)` recorded.
        recorded_frames: Recorded frames, None under R1 and R3.
        reference_frames: Frames imagined under the recorded actions, None under R1 and R2.
        valid: `(n, F)` bool, the frames before the episode's end; others count for nothing.
        rows: `(n,)` the environments these are.
    """

    frames: Tensor
    proprio: Tensor
    actions: Tensor
    reference_actions: Tensor
    recorded_frames: Tensor | None
    reference_frames: Tensor | None
    valid: Tensor
    rows: NDArray[np.int64]


RewardFunction = Callable[[RewardInputs], Tensor]
"""`(n, F)` rewards, one per frame; gets recorded and reference frames both."""


class Scorer:
    """A reward with what the environment must know about it.

    Args:
        reward: "R1", "R2", "R3" or a function.
        weights: Weights of the distance's terms, None for the defaults.
        device: Where the perceptual network lives.
        dtype: Arithmetic of the perceptual network.
        lpips_net: The perceptual network, "alex" or "vgg".

    Attributes:
        recorded: Whether it looks at recorded frames.
        imagined: Whether it looks at frames imagined under the recorded actions.

    Raises:
        ValueError: An unknown name or network, unknown weights, or weights beside a function.
    """

    def __init__(
        self,
        reward: str | RewardFunction,
        weights: Mapping[str, float] | RewardWeights | None,
        device: torch.device,
        dtype: torch.dtype,
        lpips_net: str = "alex",
    ) -> None:
        if lpips_net not in BACKBONES:
            raise ValueError(f"lpips_net={lpips_net!r}: allowed are 'alex' and 'vgg'")
        named = isinstance(reward, str)
        allowed = reward in ("R1", "R2", "R3") if named else callable(reward)
        if not allowed:
            raise ValueError(f"reward={reward!r}: allowed are 'R1', 'R2', 'R3' or a function")
        if not named and weights is not None:
            raise ValueError("reward_weights go with 'R1', 'R2' and 'R3', not with a function")
        self.recorded = not named or reward == "R2"
        self.imagined = not named or reward == "R3"
        self._reward = reward
        self._weights = _weights(weights)
        used = reward in ("R2", "R3") and self._weights.lpips > 0
        self._lpips = shared_lpips(device, dtype, lpips_net) if used else None

    def encode(self, frames: Tensor) -> Reference:
        """What comparing with reference frames `(N, T, 3, H, W)` needs, once for all members."""
        return encode_reference(frames, self._lpips)

    def __call__(
        self, inputs: RewardInputs, reference: Reference | None, groups: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards `(n, T)` and their terms, each `(n, T)`.

        Args:
            inputs: The chunk.
            reference: What `encode` returned for the groups' reference frames.
            groups: `(n,)` the group of every row.

        Raises:
            ValueError: A function returned something else, or NaN or infinity.
        """
        if self._reward == "R1":
            return action_reward(inputs.actions, inputs.reference_actions)
        if isinstance(self._reward, str):
            assert reference is not None
            return frame_reward(inputs.frames, reference, self._lpips, self._weights, groups)
        rewards = self._reward(inputs)
        valid = inputs.valid
        if not isinstance(rewards, Tensor) or rewards.shape != valid.shape:
            given = (
                f"shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards)
            )
            raise ValueError(
                f"the reward function returned {given}, expected (n, F) = {tuple(valid.shape)} in "
                "a tensor"
            )
        rewards = rewards.to(valid.device, torch.float32)
        if not rewards[valid].isfinite().all():
            raise ValueError("the reward function returned NaN or infinity: rewards must be finite")
        return rewards, {}


def _weights(weights: Mapping[str, float] | RewardWeights | None) -> RewardWeights:
    if weights is None:
        return RewardWeights()
    if isinstance(weights, RewardWeights):
        return weights
    names = [f.name for f in fields(RewardWeights)]
    if not isinstance(weights, Mapping) or not all(isinstance(w, Real) for w in weights.values()):
        raise ValueError(f"reward_weights={weights!r}: expected numbers, for the terms {names}")
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ValueError(f"reward_weights has unknown terms {unknown}: allowed are {names}")
    return RewardWeights(**weights)


def shared_lpips(device: torch.device, dtype: torch.dtype, net: str = "alex") -> LPIPS:
    """One LPIPS a process; its passes are of one size, so results do not depend on `num_envs`."""
    return _load_lpips(device, dtype, net)


@lru_cache(maxsize=4)
def _load_lpips(device: torch.device, dtype: torch.dtype, net: str) -> LPIPS:
    return LPIPS(net, dtype=dtype, micro_batch=64 if device.type == "cuda" else 8).to(device)
