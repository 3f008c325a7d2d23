"""How a policy in training does from the same imagined starts, in figures and in films."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.rollout import to_images
from wmgym.envs.scoring import RewardInputs
from wmgym.envs.starts import Start
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.recording import StepFrames, StepPicture, VideoWriter
from wmgym_agents.policy import FlowVLA, Observation

_SEED = 0
_STARTS = 32
_FILMED = 4
_FPS = 4
_HELD = 6
"""Pictures for which the last one of a film stays."""


def observation(seen: dict[str, Any], info: dict[str, Any], every: int = 1) -> Observation:
    """What the policy sees in every `every`-th row of a vector environment."""
    return {
        "image": seen["image"][::every],
        "proprio": seen["proprio"][::every],
        "instruction": list(info["instruction"])[::every],
    }


def check_lengths(envs: WorldModelVectorEnv, chunks: int) -> None:
    """Checks that the recorded episodes go on for as long as the policy is to act.

    Raises:
        ValueError: An episode ends before the last chunk begins.
    """
    chunk = math.prod((envs.single_action_space.shape or ())[:-1])
    for start in envs.starts:
        if start.steps <= (chunks - 1) * chunk:
            raise ValueError(
                f"chunks={chunks}: episode {start.info.episode_id} of {start.info.length} steps "
                f"ends {start.steps} steps after the start at {start.frame_index}, before the last "
                f"chunk of {chunk} begins; take fewer chunks, or earlier starts"
            )


class Watch:
    """The same starts again and again, of the demonstrations that training starts from.

    So whoever chooses by what it shows does not choose by what reports are about.

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
        """Writes an mp4 of four rollouts: policy, reference actions, and difference, with R3.

        They are of four tasks, if there are as many.

        Args:
            policy: Who acts.
            path: The mp4 file; it appears when it is complete.
        """
        kwargs = self._env_kwargs | {"reward": "R3", "reward_every": 1, "cache_mb": 0}
        with contextlib.closing(WorldModelVectorEnv(_FILMED, **kwargs)) as envs:
            chosen = self._filmed
            options = {
                "episode_id": [start.info.episode_id for start in chosen],
                "frame_index": [start.frame_index for start in chosen],
            }
            _, rewards, steps = self._play(policy, envs, options)
            tapes = [_pictures(envs.starts[row], row, steps, rewards) for row in range(_FILMED)]
        with VideoWriter(path, _FPS) as video:
            for number in range(max(map(len, tapes)) + _HELD):
                video.write(_grid([tape[min(number, len(tape) - 1)] for tape in tapes]))

    @property
    def _filmed(self) -> list[Start]:
        """Starts that are filmed: one of every task, then another of every task, and so on."""
        tasks: dict[int, dict[tuple[int, int], Start]] = {}
        for start in self._envs.starts:
            place = (start.info.episode_id, start.frame_index)
            tasks.setdefault(start.info.task_id, {})[place] = start
        turns = itertools.zip_longest(*(starts.values() for starts in tasks.values()))
        found = [start for turn in turns for start in turn if start is not None]
        return list(itertools.islice(itertools.cycle(found), _FILMED))

    def _play(
        self,
        policy: FlowVLA,
        envs: WorldModelVectorEnv,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], Tensor, list[RewardInputs]]:
        """First chunks `(n, T, 7)`, rewards `(chunks, n)`, and what these were computed from."""
        generator = torch.Generator().manual_seed(_SEED)
        seen, info = envs.reset(seed=_SEED, options=options)
        check_lengths(envs, self._chunks)
        chunks, rewards, steps = [], [], []
        for _ in range(self._chunks):
            chunks.append(policy.act(observation(seen, info), generator))
            seen, reward, _, _, info = envs.step(chunks[-1])
            rewards.append(reward)
            assert envs.last_step is not None
            steps.append(envs.last_step)
        return chunks[0], torch.stack(rewards), steps

    def close(self) -> None:
        """Frees the environments."""
        self._envs.close()


def _pictures(
    start: Start, row: int, steps: list[RewardInputs], rewards: Tensor
) -> list[NDArray[np.uint8]]:
    """A picture of the start of a rollout, and one of each of its control steps."""
    image, info = start.context_images[-1], start.info
    frames, trace = [StepFrames(0, image, image)], []
    for inputs, reward in zip(steps, rewards[:, row].tolist(), strict=True):
        assert inputs.reference_frames is not None
        for t in range(int(inputs.valid[row].sum())):
            both = torch.stack([inputs.frames[row, t], inputs.reference_frames[row, t]])
            trace.append(reward)
            frames.append(StepFrames(len(trace), *to_images(both).cpu().numpy()))
    detail = (
        f"task {info.task_id} · episode {info.episode_id} · from frame {start.frame_index} · "
        "reward: R3 of the chunk"
    )
    picture = StepPicture(info.instruction, detail, frames[0], len(trace))
    return [picture.compose(each, trace[: each.step], {}) for each in frames]


def _grid(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures two by two, with white below those that are lower than others."""
    height = max(len(picture) for picture in pictures)
    padded = [
        np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=255) for p in pictures
    ]
    return np.concatenate([np.concatenate(padded[i : i + 2], 1) for i in range(0, len(padded), 2)])
