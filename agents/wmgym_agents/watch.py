"""How a policy in training does from the same imagined starts, in figures and in films."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.data.video import encode
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.spaces import CONTROL_HZ
from wmgym.worlds.film import stacked
from wmgym_agents.policy import FlowVLA, Observation

_SEED = 0
_STARTS = 32
_FILMED = 4


def observation(seen: dict[str, Any], info: dict[str, Any], every: int = 1) -> Observation:
    """What the policy sees in every `every`-th row of a vector environment."""
    return {
        "image": seen["image"][::every],
        "proprio": seen["proprio"][::every],
        "instruction": list(info["instruction"])[::every],
    }


class Watch:
    """The same starts again and again.

    Args:
        policy: The policy before training.
        chunks: Chunks of a rollout.
        **env_kwargs: Arguments of the environment, with `output="torch"`.
    """

    def __init__(self, policy: FlowVLA, chunks: int, **env_kwargs: Any) -> None:
        self._chunks, self._env_kwargs = chunks, env_kwargs
        self._envs = WorldModelVectorEnv(_STARTS, **env_kwargs)
        self._before = self._play(policy, self._envs)[0]

    @torch.no_grad()
    def figures(self, policy: FlowVLA) -> dict[str, float]:
        """What a policy does without noise while denoising.

        Returns:
            `reward`, its mean, and `drift`, the mean distance of its first chunks to those of the
            policy before training.
        """
        actions, rewards, _ = self._play(policy, self._envs)
        drift = float(np.abs(actions - self._before)[..., :-1].mean())
        return {"reward": float(rewards.mean()), "drift": drift}

    @torch.no_grad()
    def film(self, policy: FlowVLA, path: Path) -> None:
        """Writes an mp4: per start one row, policy | reference actions | absolute difference.

        Args:
            policy: Who acts.
            path: The mp4 file; it appears when it is complete.
        """
        kwargs = self._env_kwargs | {"reward": "R3", "reward_every": 1, "cache_mb": 0}
        with contextlib.closing(WorldModelVectorEnv(_FILMED, **kwargs)) as envs:
            both = self._play(policy, envs)[2].cpu()
        acted, reference = both.chunk(2, dim=-1)
        part = path.with_name(path.name + ".part.mp4")
        encode(part, stacked(torch.cat([both, (acted - reference).abs()], dim=-1)), CONTROL_HZ)
        part.replace(path)

    def _play(
        self, policy: FlowVLA, envs: WorldModelVectorEnv
    ) -> tuple[NDArray[np.float32], Tensor, Tensor]:
        """First chunks `(n, T, 7)`, rewards `(chunks, n)`, frames beside the reference's, if any.

        The last are `(n, chunks F, 3, H, 2 W)`.
        """
        generator = torch.Generator().manual_seed(_SEED)
        seen, info = envs.reset(seed=_SEED)
        chunks, rewards, frames = [], [], []
        for _ in range(self._chunks):
            chunks.append(policy.act(observation(seen, info), generator))
            seen, reward, _, _, info = envs.step(chunks[-1])
            rewards.append(reward)
            step = envs.last_step
            if step is not None and step.reference_frames is not None:
                frames.append(torch.cat([step.frames, step.reference_frames], dim=-1).float())
        shown = torch.cat(frames, dim=1) if frames else torch.empty(0)
        return chunks[0], torch.stack(rewards), shown

    def close(self) -> None:
        """Frees the environments."""
        self._envs.close()
