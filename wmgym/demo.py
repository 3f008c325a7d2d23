"""The main job in one command: imagine, score, look.

On the shipped world and the shipped demonstrations, without a simulator: the reference actions,
noisy ones and random ones run side by side in one batch of imagined environments; a table shows R1,
R2 and R3 of each, and a video of each shows what was imagined. Then the shipped policy is trained
in the shipped world for a few steps of GRPO, from a few moments that it learns by heart, and filmed
before and after.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import wmgym  # noqa: F401 - registers the environments
from wmgym.data.episodes import EpisodeInfo
from wmgym.recording import noisy_reference_policy, record_rollout, reference_policy

NOISE = (0.1, 0.3, 1.0)
RANDOM = "random actions"
REFERENCE = "reference actions"
MOMENTS = 8
"""Starts of the fine-tuning: few, so that a few steps are seen to teach."""


@dataclass(frozen=True)
class DemoConfig:
    """What to show.

    Attributes:
        world: Name or folder of the world.
        suite: LIBERO suite.
        out: Folder of the videos.
        starts: Starts that every kind of action is run from.
        horizon: Control steps imagined.
        seed: Seed of starts and noise.
        policy: Name or folder of the policy that is fine-tuned.
        steps: Steps of GRPO; 0 leaves it out.
    """

    world: str = "libero-small"
    suite: str = "libero_object"
    out: Path = Path("demo")
    starts: int = 16
    horizon: int = 8
    seed: int = 0
    policy: str = "libero-object-small"
    steps: int = 20


def kinds() -> list[str]:
    """Names of the kinds of action, from best to worst."""
    return [REFERENCE, *(f"reference + noise {size}" for size in NOISE), RANDOM]


def demo(config: DemoConfig, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Runs the demonstration.

    Args:
        config: What to show.
        say: Called with every line of the table and with what was written.

    Returns:
        R1, R2 and R3 by kind of action.
    """
    say(f"{config.world} on {config.suite}: {config.starts} starts, {config.horizon} control steps")
    table: dict[str, dict[str, float]] = {kind: {} for kind in kinds()}
    speed = {}
    for reward in ("R1", "R2", "R3"):
        rewards, speed[reward] = _score(config, reward)
        for kind, value in zip(table, rewards, strict=True):
            table[kind][reward] = value
    say(f"{'':26s}" + "".join(f"{reward:>10s}" for reward in ("R1", "R2", "R3")))
    for kind, row in table.items():
        say(f"{kind:26s}" + "".join(f"{value:10.4f}" for value in row.values()))
    say(f"{speed['R3']:.0f} imagined frames per second with R3")
    for kind, path in _videos(config).items():
        say(f"{kind}: {path}")
    if config.steps:
        _fine_tune(config, say)
    return table


def _score(config: DemoConfig, reward: str) -> tuple[NDArray[np.float64], float]:
    """Mean reward of each kind, and imagined frames per second."""
    members = len(kinds())
    env = gym.make_vec(
        "WorldModel-LIBERO-v0",
        num_envs=config.starts * members,
        group_size=members,
        world=config.world,
        suite=config.suite,
        split="held_out",
        reward=reward,
        horizon=config.horizon,
        action_chunk=config.horizon,
        autoreset_mode="Disabled",
    )
    _, info = env.reset(seed=config.seed)
    actions = chunks(info["reference_action"], np.random.default_rng(config.seed))
    began = time.perf_counter()
    _, rewards, _, _, _ = env.step(actions)
    seconds = time.perf_counter() - began
    env.close()
    by_kind = np.asarray(rewards).reshape(config.starts, members).mean(axis=0)
    return by_kind, config.horizon * len(actions) / seconds


def chunks(reference: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Each group's chunks `(B, T, 7)`: its reference, noisy copies of it, and random actions."""
    actions = reference.copy()
    members = len(kinds())
    for k, size in enumerate(NOISE, start=1):
        noise = rng.normal(0, size, actions[k::members].shape)
        actions[k::members] = np.clip(actions[k::members] + noise, -1, 1)
    actions[members - 1 :: members] = rng.uniform(-1, 1, actions[members - 1 :: members].shape)
    return actions


def moment(rng: np.random.Generator, episodes: Sequence[EpisodeInfo]) -> tuple[int, int]:
    """One of a few starts: a third into one of the first episodes."""
    episode = episodes[int(rng.random() * min(MOMENTS, len(episodes)))]
    return episode.episode_id, episode.length // 3


def _fine_tune(config: DemoConfig, say: Callable[[str], None]) -> None:
    """A few steps of GRPO from a few moments: the reward at them, and films of them."""
    from wmgym_agents.grpo import PRESETS, GRPOConfig, grpo

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        changes = PRESETS["small"] | {"members": 16, "decay": True, "warmup": 0, "save_every": 5}
        changes |= {"learning_rate": 5e-5, "sigma_learning_rate": 5e-5}
        settings = GRPOConfig(
            policy=config.policy,
            out=out,
            world=config.world,
            suite=config.suite,
            steps=config.steps,
            film_every=config.steps,
            seed=config.seed,
            **changes,
        )
        say(
            f"GRPO on {config.policy}: {config.steps} steps of {settings.starts} starts x "
            f"{settings.members} members, at {MOMENTS} moments of held-out demonstrations"
        )
        grpo(settings, starts=moment, split="held_out")
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for entry in entries:
            if entry["group"] == "watch":
                say(f"step {entry['step']:3d}: R3 {entry['reward']:.5f}")
        films = sorted(out.glob("*.mp4"))
        for name, film in zip(("before", "after"), (films[0], films[-1]), strict=True):
            path = config.out / f"policy-{name}.mp4"
            shutil.move(film, path)
            say(f"policy {name}, beside the reference and their difference: {path}")


def _videos(config: DemoConfig) -> dict[str, Path]:
    """A video of three chunks in a row for the reference, for noise, and for random actions."""
    env = gym.make(
        "WorldModel-LIBERO-v0",
        world=config.world,
        suite=config.suite,
        split="held_out",
        horizon=3 * config.horizon,
    )
    rng = np.random.default_rng(config.seed)
    space = env.action_space
    space.seed(config.seed)
    policies = {
        REFERENCE: reference_policy,
        f"reference + noise {NOISE[1]}": noisy_reference_policy(NOISE[1], rng),
        RANDOM: lambda observation, info: space.sample(),
    }
    written = {}
    for kind, policy in policies.items():
        name = kind.replace(" + ", "-").replace(" ", "-")
        record = record_rollout(env, policy, config.out / f"{name}.mp4", seed=config.seed)
        written[kind] = record.video
    env.close()
    return written
