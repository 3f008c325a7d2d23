"""stable-baselines3's PPO in imagination: the job of `ppo_cleanrl.py`, with a library's algorithm.

    pip install 'wmgym[sb3]'
    python examples/ppo_sb3.py
    python examples/ppo_sb3.py --reward R1 --task 3 --iterations 100

One JSON line per rollout; the last line compares the first third of the run with the last.
Stacked around the world: `SB3VecEnv` translates, `VecMonitor` counts, `Thumbnails` makes images
small so that a network of two small layers is enough on a CPU, `VecNormalize` standardises.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from wmgym.adapters.sb3 import SB3VecEnv


@dataclass
class Args:
    """stable-baselines3's PPO on WorldModel-LIBERO-v0."""

    seed: int = 1
    """seed of starts, weights and actions"""
    device: str = "cpu"
    """where the world is: cpu, cuda or auto"""
    world: str = "libero-small"
    """name of a shipped world, or a checkpoint folder"""
    suite: str = "libero_object"
    """LIBERO suite of the demonstrations"""
    task: int = 0
    """task of the suite"""
    reward: Literal["R1", "R2", "R3"] = "R3"
    """what the policy is measured against: recorded actions, recorded frames, imagined frames"""
    starts: Literal["episodes", "frames"] = "episodes"
    """imagine from the first frame of recorded episodes, or from any"""
    horizon: int = 8
    """control steps of an imagined episode"""
    num_envs: int = 16
    """imagined episodes at a time"""
    num_steps: int = 16
    """control steps of each between two updates, a multiple of the horizon"""
    iterations: int = 30
    """updates"""
    learning_rate: float = 1e-3
    """of Adam, falling linearly to 0"""


class Thumbnails(VecEnvWrapper):
    """Observations as vectors: the image averaged over squares of 8 pixels, and proprioception."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        size = self._look(venv.observation_space.sample()).size
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def _look(self, observation: dict[str, NDArray]) -> NDArray[np.float32]:
        *batch, height, width, _ = observation["image"].shape
        squares = observation["image"].reshape(*batch, height // 8, 8, width // 8, 8, 3)
        thumbnail = squares.mean((-4, -2), dtype=np.float32).reshape(*batch, -1) / 255
        return np.concatenate([thumbnail, observation["proprio"]], -1)

    def reset(self) -> NDArray[np.float32]:
        """Starts new episodes."""
        return self._look(self.venv.reset())

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray, NDArray, list[dict]]:
        """Advances, with the last observations of ended episodes made small, too."""
        observation, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self._look(info["terminal_observation"])
        return self._look(observation), rewards, dones, infos


class Progress(BaseCallback):
    """Prints the mean episodic reward of every rollout and keeps it in `history`."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []
        self._finished: list[float] = []
        self._start_time = time.perf_counter()

    def _on_step(self) -> bool:
        ended = [info["episode"] for info in self.locals["infos"] if "episode" in info]
        self._finished += [float(episode["r"]) for episode in ended]
        return True

    def _on_rollout_end(self) -> None:
        self.history.append(float(np.mean(self._finished)))
        self._finished.clear()
        line = {
            "iteration": len(self.history) - 1,
            "steps": self.num_timesteps,
            "episodic_reward": round(self.history[-1], 4),
            "seconds": round(time.perf_counter() - self._start_time, 1),
        }
        print(json.dumps(line), flush=True)


def main(args: Args, **env_kwargs: Any) -> list[float]:
    """Trains.

    Args:
        args: Settings.
        **env_kwargs: Further arguments of the environment, instead of those in `args`.

    Returns:
        Mean episodic reward of every rollout.
    """
    chosen = {
        "world": args.world,
        "suite": args.suite,
        "tasks": [args.task],
        "reward": args.reward,
        "starts": args.starts,
        "horizon": args.horizon,
        "device": args.device,
    }
    monitored = VecMonitor(SB3VecEnv(args.num_envs, **(chosen | env_kwargs)))
    envs = VecNormalize(Thumbnails(monitored), gamma=0.9, clip_obs=5.0)
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=lambda remaining: args.learning_rate * remaining,
        n_steps=args.num_steps,
        batch_size=args.num_steps * args.num_envs // 4,
        n_epochs=8,
        gamma=0.9,
        gae_lambda=0.9,
        policy_kwargs={"log_std_init": -1.0},
        seed=args.seed,
        device="cpu",
    )
    progress = Progress()
    model.learn(args.iterations * args.num_steps * args.num_envs, callback=progress)
    envs.close()
    third = max(1, len(progress.history) // 3)
    first, last = np.mean(progress.history[:third]), np.mean(progress.history[-third:])
    print(f"mean episodic {args.reward}: {first:.4f} in the first third, {last:.4f} in the last")
    return progress.history


if __name__ == "__main__":
    main(tyro.cli(Args))
