"""Groups: several futures of one start, compared with each other, and the best one carried on.

    python examples/group_rollouts.py

The members of a group share a start and its reference, so their rewards differ by their actions
alone: normalised within the group they are the advantages of GRPO. `fork` then lets every member
continue from where the best one is. Everything stays tensors on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
import tyro
from torch import Tensor

import wmgym

gym.register_envs(wmgym)


@dataclass
class Args:
    """Grouped rollouts on WorldModel-LIBERO-v0."""

    seed: int = 0
    """seed of starts and noise"""
    device: str = "cpu"
    """where the world is: cpu, cuda or auto"""
    groups: int = 4
    """starts"""
    members: int = 8
    """futures of each"""
    chunks: int = 2
    """chunks of 8 actions, the best of each carried on"""


def main(args: Args, **env_kwargs: Any) -> Tensor:
    """Rolls out groups whose members follow the reference with more and more noise.

    Args:
        args: Settings.
        **env_kwargs: Further arguments of the environment.

    Returns:
        Rewards `(chunks, groups, members)`.
    """
    envs: Any = gym.make_vec(
        "WorldModel-LIBERO-v0",
        num_envs=args.groups * args.members,
        group_size=args.members,
        action_chunk=8,
        horizon=8 * args.chunks,
        autoreset_mode="Disabled",
        output="torch",
        device=args.device,
        **env_kwargs,
    )
    _, info = envs.reset(seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    history = []
    for chunk in range(args.chunks):
        reference = info["reference_action"]
        noise = torch.randn(reference.shape, generator=generator).to(reference)
        size = torch.linspace(0, 1, args.members).repeat(args.groups).to(reference)
        actions = (reference + size[:, None, None] * noise).clamp(-1, 1)

        _, rewards, _, _, info = envs.step(actions)
        rewards = rewards.view(args.groups, args.members)
        spread = rewards.std(1, keepdim=True) + 1e-6
        advantages = (rewards - rewards.mean(1, keepdim=True)) / spread
        history.append(rewards)
        for group, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
            best = group * args.members + int(reward.argmax())
            _, info = envs.fork(best, range(group * args.members, (group + 1) * args.members))
            print(f"chunk {chunk}, group {group}: advantages", *(f"{a:+.2f}" for a in advantage))
    envs.close()
    return torch.stack(history)


if __name__ == "__main__":
    main(tyro.cli(Args))
