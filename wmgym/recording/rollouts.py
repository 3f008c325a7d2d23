"""`record_rollout`: one imagined episode to an mp4 and a PNG strip.

The environment keeps what a recording needs: `starts` (the recorded frames of every row) and
`last_step` (every imagined frame of the step, those of the reference branch included). It is driven
through whatever wrappers it has; the pictures are taken from the environment inside. A picture is
encoded as soon as its step is done, so memory holds the columns of the strip and no video.

A chunk of `T` actions gives `T` pictures, or one for every `reward_every` of them where the
environment draws no more; its reward, the mean over the chunk, stands at each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.infos import take_row
from wmgym.envs.rollout import to_images
from wmgym.envs.scoring import RewardInputs
from wmgym.envs.starts import Start
from wmgym.envs.world_model import WorldModelEnv, WorldModelVectorEnv
from wmgym.recording.panels import StepFrames, StepPicture
from wmgym.recording.strip import compose_strip, strip_steps
from wmgym.recording.video import VideoWriter, save_picture

Policy = Callable[[Any, dict[str, Any]], Any]
"""`(observation, info) -> action`, or observations, infos and actions of all rows."""


@dataclass(frozen=True)
class RolloutRecord:
    """What `record_rollout` did; `E` environment steps.

    Attributes:
        video: The mp4 file: one frame for the start and one for every control step that is drawn.
        strip: The PNG file, None if none was asked for.
        instruction: Task in words.
        episode_id: The recorded episode.
        frame_index: Its step where the rollout starts.
        control_steps: Control steps imagined.
        rewards: `(E,)` float64.
        terms: Terms of the reward by name, each `(E,)` float64.
        terminated: Whether the world predicted success.
        truncated: Whether the horizon or the end of the recorded episode was reached.
    """

    video: Path
    strip: Path | None
    instruction: str
    episode_id: int
    frame_index: int
    control_steps: int
    rewards: NDArray[np.float64]
    terms: dict[str, NDArray[np.float64]]
    terminated: bool
    truncated: bool


def reference_policy(observation: Any, info: Mapping[str, Any]) -> Any:
    """Does what was recorded: `info["reference_action"]`."""
    return info["reference_action"]


def noisy_reference_policy(scale: float, rng: np.random.Generator) -> Policy:
    """A policy that adds Gaussian noise to the recorded action, clipped to [-1, 1].

    Args:
        scale: Standard deviation in units of the action, >= 0; every dimension gets the same.
        rng: The noise; its only randomness.

    Raises:
        ValueError: A negative scale.
    """
    if not scale >= 0:
        raise ValueError(f"scale={scale!r}: must be at least 0")

    def policy(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
        action = info["reference_action"]
        clean = action.cpu().numpy() if isinstance(action, Tensor) else np.asarray(action)
        noise = scale * rng.standard_normal(clean.shape)
        return np.clip(clean + noise, -1.0, 1.0).astype(np.float32)

    return policy


def record_rollout(
    env: gym.Env | VectorEnv,
    policy: Policy,
    path: str | os.PathLike[str],
    *,
    seed: int | None = None,
    options: dict[str, Any] | None = None,
    row: int = 0,
    max_steps: int | None = None,
    fps: float = 5,
    strip: bool = True,
    columns: int = 8,
) -> RolloutRecord:
    """Runs one imagined episode and writes it to `<path>.mp4` and, as a strip, `<path>.png`.

    Args:
        env: A `WorldModelEnv` or `WorldModelVectorEnv`, wrapped or not, with or without render
            mode. It is reset first and left where the episode ended.
        policy: `(observation, info) -> action`; of a vector environment it gets and returns all
            rows.
        path: The files' path without suffix; missing folders are made, old files are replaced.
        seed: Passed to `reset`.
        options: Passed to `reset`.
        row: Which row of a vector environment is recorded.
        max_steps: Environment steps to stop after, None for the whole episode.
        fps: Control steps shown per second; 20 is the robot's own pace.
        strip: Whether to write the strip.
        columns: Most steps that the strip shows, >= 2.

    Returns:
        Paths, rewards and terms.

    Raises:
        TypeError: `env` is no world-model environment.
        ValueError: A row that does not exist, a bound that is too low, or a `reset_mask`.
    """
    core = _core(env)
    single = isinstance(env.unwrapped, WorldModelEnv)
    if not 0 <= row < core.num_envs:
        raise ValueError(f"row={row}: the environment has rows 0 to {core.num_envs - 1}")
    if columns < 2 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"columns={columns}, max_steps={max_steps}: at least 2 and 1 are needed")
    if "reset_mask" in (options or {}):
        raise ValueError("options['reset_mask'] cannot be used here: a recording resets all rows")
    name = Path(path)
    name = name.with_suffix("") if name.suffix in (".mp4", ".png") else name

    observation, info = env.reset(seed=seed, options=options)
    start = core.starts[row]
    chunk = math.prod((core.single_action_space.shape or ())[:-1])
    steps = start.steps if max_steps is None else min(start.steps, max_steps * chunk)
    at = (lambda value: value) if single else (lambda value: value[row])
    tape = _Tape(start, steps, core.reward_every, columns)
    terminated = truncated = False
    with VideoWriter(name.with_name(f"{name.name}.mp4"), fps) as video:
        while not (terminated or truncated or len(tape.rewards) == max_steps):
            observation, rewards, ends, cuts, info = env.step(policy(observation, info))
            terminated, truncated = bool(at(ends)), bool(at(cuts))
            assert core.last_step is not None
            terms = _terms(info if single else _row_info(info, row))
            for picture in tape.add(core.last_step, row, float(at(rewards)), terms):
                video.write(picture)
    target = None
    if strip:
        target = name.with_name(f"{name.name}.png")
        save_picture(target, tape.strip())
    return RolloutRecord(
        video=video.path,
        strip=target,
        instruction=start.info.instruction,
        episode_id=start.info.episode_id,
        frame_index=start.frame_index,
        control_steps=len(tape.trace),
        rewards=np.array(tape.rewards),
        terms={key: np.array(values) for key, values in tape.terms.items()},
        terminated=terminated,
        truncated=truncated,
    )


class _Tape:
    """Turns environment steps into pictures and keeps what the strip and the record need."""

    def __init__(self, start: Start, steps: int, every: int, columns: int) -> None:
        self.rewards: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.trace: list[float] = []
        self._start = start
        self._steps, self._every = steps, every
        self._shown = {every * shown for shown in strip_steps(steps // every, columns)}
        self._columns: list[StepFrames] = []
        self._last: StepFrames | None = None
        self._picture: StepPicture | None = None
        info = start.info
        where = [info.suite, f"task {info.task_id}", f"episode {info.episode_id}"]
        self._detail = " · ".join([*filter(None, where), f"from frame {start.frame_index}"])

    def add(
        self, inputs: RewardInputs, row: int, reward: float, terms: dict[str, float]
    ) -> Iterator[NDArray[np.uint8]]:
        """The pictures of one environment step, before the first one that of the start."""
        index = int(np.flatnonzero(inputs.rows == row)[0])
        branch = inputs.reference_frames
        if self._picture is None:
            image = self._start.context_images[-1]
            begin = StepFrames(0, image, None if branch is None else image, image)
            self._picture = StepPicture(
                self._start.info.instruction, self._detail, begin, self._steps
            )
            yield self._draw(begin, {})
        self.rewards.append(reward)
        for key, value in terms.items():
            self.terms.setdefault(key, []).append(value)
        for t in range(int(inputs.valid[index].sum())):
            self.trace += [reward] * self._every
            yield self._draw(
                StepFrames(
                    step=len(self.trace),
                    policy=to_images(inputs.frames[index, t]).cpu().numpy(),
                    reference=None if branch is None else to_images(branch[index, t]).cpu().numpy(),
                    recorded=self._start.images[len(self.trace) - 1],
                ),
                terms,
            )

    def strip(self) -> NDArray[np.uint8]:
        """The strip; the last step is always on it."""
        columns = list(self._columns)
        if self._last is not None and self._last.step != columns[-1].step:
            columns.append(self._last)
        return compose_strip(self._start.info.instruction, self._detail, columns, self.trace)

    def _draw(self, frames: StepFrames, terms: dict[str, float]) -> NDArray[np.uint8]:
        assert self._picture is not None
        if frames.step in self._shown:
            self._columns.append(frames)
        self._last = frames
        return self._picture.compose(frames, self.trace, terms)


def _core(env: gym.Env | VectorEnv) -> WorldModelVectorEnv:
    inner = env.unwrapped
    if isinstance(inner, WorldModelEnv):
        return inner.vector
    if isinstance(inner, WorldModelVectorEnv):
        return inner
    raise TypeError(
        f"env is a {type(inner).__name__}: recordings are made of WorldModel-LIBERO-v0, single or "
        "vector; use gymnasium.wrappers.RecordVideo for others"
    )


def _row_info(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The terms of a row's step; they are in `final_info` where it was reset in the same step."""
    kept = {key: infos[key] for key in ("reward_terms", "final_info") if key in infos}
    info = take_row({**kept, **{f"_{key}": infos[f"_{key}"] for key in kept}}, row)
    return info.get("final_info", info)


def _terms(info: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in info.get("reward_terms", {}).items()}
