"""Where policies err: their chunks against the recorded ones, by phase of the movement.

    python examples/where_policies_err.py libero-object-small runs/experiment/R3-0/policy

From the same held-out starts every policy answers with a chunk, with noise and without. Most of a
demonstration is fast travel, where many ways are as good as another; a task is lost where the hand
is slow, and where the gripper opens or closes. So errors are told apart: in chunks that are fast,
slow, or in which the gripper changes. Beside them is the imagined R3, which does not tell them
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from wmgym_agents import FlowVLA

import wmgym
from wmgym.reports import write_report

gym.register_envs(wmgym)

SLOW = 0.15
"""Chunks are slow whose mean |translation| is below, of commands in [-1, 1]."""


@dataclass
class Args:
    """Errors of policies on held-out starts, by phase."""

    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """names of shipped policies, or folders; told apart by name and the folder above `policy`"""
    dataset: Path | None = None
    """demonstrations, whose held-out starts are used; None: those that ship"""
    suite: str = "libero_object"
    """LIBERO suite"""
    starts: int = 128
    """starts"""
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """sizes of the noise that policies denoise"""
    seed: int = 0
    """seed of starts and noise"""
    out: Path | None = None
    """JSON file of the figures"""


def main(args: Args, **env_kwargs: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Prints errors as they are measured.

    Args:
        args: Settings.
        **env_kwargs: Further arguments of the environment.

    Returns:
        By policy and temperature: `fast`, `slow` and `gripper`, mean absolute errors of the
        translation in chunks of that kind; `late`, the share of gripper commands that are wrong
        where it changes; `R3`; and how many chunks are of each kind, `fast_chunks` and so on.
    """
    envs: Any = gym.make_vec(
        "WorldModel-LIBERO-v0",
        num_envs=args.starts,
        suite=args.suite,
        dataset=args.dataset,
        split="held_out",
        action_chunk=8,
        reward_every=4,
        reference_actions="intended",
        autoreset_mode="Disabled",
        dtype="bfloat16",
        **env_kwargs,
    )
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in args.policies:
        policy = FlowVLA.from_pretrained(name)
        path = Path(name)
        told = path.parent.name if path.name == "policy" else path.name
        figures[told] = {}
        for temperature in args.temperatures:
            seen, info = envs.reset(seed=args.seed)
            observation = {**seen, "instruction": list(info["instruction"])}
            generator = torch.Generator().manual_seed(args.seed)
            chunks = policy.act(observation, generator, temperature)
            _, rewards, _, _, _ = envs.step(chunks)
            row = errors(np.asarray(chunks), info["reference_action"])
            row["R3"] = float(np.mean(rewards))
            figures[told][f"temperature {temperature:g}"] = row
            cells = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"{told}, temperature {temperature:g}: {cells}", flush=True)
    envs.close()
    if args.out is not None:
        command = f"python examples/where_policies_err.py {' '.join(args.policies)}"
        command += f" --suite {args.suite} --dataset {args.dataset} --starts {args.starts}"
        report = {"starts": args.starts, "policies": figures}
        write_report(args.out, report, command=command, seed=args.seed)
    return figures


def errors(chunks: NDArray[np.float32], recorded: NDArray[np.float32]) -> dict[str, float]:
    """What `main` returns, but R3, of chunks `(B, T, 7)` against the recorded ones."""
    wrong = np.abs(chunks - recorded)[..., :3].mean(axis=(1, 2))
    changes = (np.diff(recorded[..., 6], axis=1) != 0).any(axis=1)
    slow = np.abs(recorded[..., :3]).mean(axis=(1, 2)) < SLOW
    late = np.sign(chunks[..., 6]) != np.sign(recorded[..., 6])
    kinds = {"fast": ~slow & ~changes, "slow": slow & ~changes, "gripper": changes}
    figures = {name: float(wrong[kind].mean()) for name, kind in kinds.items()}
    figures["late"] = float(late[changes].mean())
    return figures | {f"{name}_chunks": int(kind.sum()) for name, kind in kinds.items()}


if __name__ == "__main__":
    main(tyro.cli(Args))
