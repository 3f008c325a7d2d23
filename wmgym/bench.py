"""How fast imagination is, against the simulator it replaces, in the same run.

Imagined control steps per second at many environments, with R3 and observations as pixels, and
control steps per second of `LIBERO-v0` with one camera at the same resolution, measured in turns so
that a machine that slows down slows both. The split says where an imagined step spends its time.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import wmgym  # noqa: F401 - registers the environments
from wmgym.envs.scoring import shared_lpips
from wmgym.envs.world_model import WorldModelVectorEnv
from wmgym.timing import Timer
from wmgym.worlds.latent_world import LatentWorld
from wmgym.worlds.world import DTYPES


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        world: Name or folder of the world.
        suite: LIBERO suite of both environments.
        num_envs: Imagined environments.
        group_size: Members that share a start and its reference.
        action_chunk: Control steps per step of the imagined environments.
        dtype: Arithmetic of the world and of LPIPS, "float32" or "bfloat16".
        libero_steps: Control steps of the simulator per repeat.
        repeats: Repeats of which the median is reported.
        seed: Seed of starts and actions.
        device: "auto", "cpu" or "cuda".
        out: The report; none is written without.
    """

    world: str = "libero-small"
    suite: str = "libero_object"
    num_envs: int = 64
    group_size: int = 16
    action_chunk: int = 8
    dtype: str = "bfloat16"
    libero_steps: int = 40
    repeats: int = 5
    seed: int = 0
    device: str = "auto"
    out: Path | None = None


def bench(config: BenchConfig, *, libero: bool = True) -> dict[str, Any]:
    """Measures both environments.

    Args:
        config: What to measure.
        libero: Also measure the simulator (extra `libero`); without it there is no ratio.

    Returns:
        `imagined_steps_per_s` (median of control steps over all environments, reward and pixels
        included), `libero_steps_per_s` as LIBERO renders, `libero_fast_steps_per_s` with
        `fast_rendering`, `ratio` of the first two, and `split` with the share of dynamics, drawing,
        LPIPS and the rest.
    """
    imagined = _Imagined(config)
    real = {name: _Real(config, fast) for name, fast in _RENDERINGS.items()} if libero else {}
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(config.repeats):
        rates["imagined_steps_per_s"].append(imagined.rate())
        for name, simulator in real.items():
            rates[name].append(simulator.rate())
    figures: dict[str, Any] = {
        name: round(statistics.median(values), 2) for name, values in rates.items()
    }
    figures["repeats"] = {name: [round(v, 2) for v in values] for name, values in rates.items()}
    if libero:
        figures["ratio"] = round(figures["imagined_steps_per_s"] / figures["libero_steps_per_s"], 2)
    figures["split"] = imagined.split()
    return {**figures, "num_envs": config.num_envs, "action_chunk": config.action_chunk}


_RENDERINGS = {"libero_steps_per_s": False, "libero_fast_steps_per_s": True}


class _Imagined:
    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.env: WorldModelVectorEnv = gym.make_vec(  # type: ignore[assignment]
            "WorldModel-LIBERO-v0",
            num_envs=config.num_envs,
            world=config.world,
            suite=config.suite,
            group_size=config.group_size,
            action_chunk=config.action_chunk,
            horizon=config.action_chunk,
            dtype=config.dtype,
            device=config.device,
            autoreset_mode="Disabled",
            cache_mb=0,
        )
        if not isinstance(self.env.world, LatentWorld):
            raise ValueError(
                f"world={config.world!r} is a published one: `wmgym bench-published` measures those"
            )
        self._world = self.env.world
        self._rng = np.random.default_rng(config.seed)
        self._count = 0
        self.rate()

    def rate(self) -> float:
        """Control steps per second of a chunk from fresh starts, reference branch included."""
        self._count += 1
        self.env.reset(seed=self.config.seed + self._count)
        actions = self._rng.uniform(-1, 1, self.env.action_space.shape).astype(np.float32)
        began = time.perf_counter()
        self.env.step(actions)
        return self.config.num_envs * self.config.action_chunk / (time.perf_counter() - began)

    def split(self) -> dict[str, float]:
        """Share of the parts in one step."""
        model, timer = self._world.model, Timer(self._world.device)
        lpips = shared_lpips(self._world.device, DTYPES[self.config.dtype])
        with (
            timer.method(model.dynamics, "forward", "dynamics"),
            timer.method(model.tokenizer, "decode", "drawing"),
            timer.method(lpips, "features", "lpips"),
            timer.method(lpips, "distance", "lpips"),
            timer.method(self.env, "step", "all"),
        ):
            for _ in range(self.config.repeats):
                self.rate()
        everything = timer.seconds.pop("all")
        shares = {name: round(value / everything, 4) for name, value in timer.seconds.items()}
        return {**shares, "rest": round(1 - sum(shares.values()), 4)}


class _Real:
    def __init__(self, config: BenchConfig, fast: bool) -> None:
        self.config = config
        self.env = gym.make("LIBERO-v0", suite=config.suite, tasks=[0], fast_rendering=fast)
        self._rng = np.random.default_rng(config.seed)
        self.env.reset(seed=config.seed)
        self.rate()

    def rate(self) -> float:
        """Control steps per second, every one rendered."""
        steps = self.config.libero_steps
        self.env.reset(seed=self.config.seed)
        actions = self._rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
        began = time.perf_counter()
        for action in actions:
            self.env.step(action)
        return steps / (time.perf_counter() - began)
