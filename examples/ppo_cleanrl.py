"""PPO in one file: a policy learns from nothing, in imagination, against a verified reward.

In the style of CleanRL's single files, over one batched environment whose observations and rewards
stay tensors on its device:

    python examples/ppo_cleanrl.py
    python examples/ppo_cleanrl.py --reward R1 --task 3 --iterations 100

One JSON line per iteration; the last line compares the first third of the run with the last.
What departs from the textbook: an imagined episode is cut at its horizon, which is no end, so the
value of what would have followed is added there; and the policy sees a 16 x 16 thumbnail, averaged
once on the way in, so that a network of two small layers is enough on a CPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributions import Normal

import wmgym

gym.register_envs(wmgym)


@dataclass
class Args:
    """PPO on WorldModel-LIBERO-v0."""

    seed: int = 1
    """seed of starts, weights and actions"""
    device: str = "cpu"
    """where the world and the policy are: cpu, cuda or auto"""
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
    gamma: float = 0.9
    """discount"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches of an epoch"""
    update_epochs: int = 8
    """epochs of an update"""
    clip_coef: float = 0.2
    """clipping of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """clipping of the gradient's norm"""


def layer(inputs: int, outputs: int, std: float = 2**0.5) -> nn.Linear:
    """A linear layer with orthogonal weights and no bias at first."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, std)
    nn.init.zeros_(linear.bias)
    return linear


def look(obs: dict[str, Tensor], size: int = 16) -> Tensor:
    """Observations as vectors `(B, 3 * size**2 + 8)`: a thumbnail and proprioception."""
    image = obs["image"].movedim(-1, 1).float() / 255
    return torch.cat([F.adaptive_avg_pool2d(image, size).flatten(1), obs["proprio"]], 1)


class Agent(nn.Module):
    """Actor and critic over vectors, which are standardised as the first ones were."""

    def __init__(self, first: Tensor, actions: int) -> None:
        super().__init__()
        self.register_buffer("mean", first.mean(0))
        self.register_buffer("std", first.std(0).clamp(min=0.02))
        self.critic = self._network(first.shape[1], 1)
        self.actor_mean = self._network(first.shape[1], actions)
        self.actor_logstd = nn.Parameter(torch.full((actions,), -1.0))

    def _network(self, inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
        hidden = [layer(inputs, width), nn.Tanh(), layer(width, width), nn.Tanh()]
        return nn.Sequential(*hidden, layer(width, outputs, std=0.01))

    def _standardise(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-5, 5)

    def get_value(self, x: Tensor) -> Tensor:
        """Values `(B,)`."""
        return self.critic(self._standardise(x))[:, 0]

    def get_action(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Actions `(B, A)`, drawn unless given, their log-probabilities and entropies `(B,)`."""
        policy = Normal(self.actor_mean(self._standardise(x)), self.actor_logstd.exp())
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action).sum(1), policy.entropy().sum(1)


def main(args: Args, **env_kwargs: Any) -> list[float]:
    """Trains.

    Args:
        args: Settings.
        **env_kwargs: Further arguments of the environment, instead of those in `args`.

    Returns:
        Mean episodic reward of every iteration.
    """
    torch.manual_seed(args.seed)
    chosen = {
        "world": args.world,
        "suite": args.suite,
        "tasks": [args.task],
        "reward": args.reward,
        "starts": args.starts,
        "horizon": args.horizon,
        "device": args.device,
    }
    envs: Any = gym.make_vec(
        "WorldModel-LIBERO-v0",
        num_envs=args.num_envs,
        autoreset_mode="SameStep",
        output="torch",
        **(chosen | env_kwargs),
    )
    next_obs, _ = envs.reset(seed=args.seed)
    next_obs = look(next_obs)
    device = next_obs.device
    agent = Agent(next_obs, envs.single_action_space.shape[0]).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, next_obs.shape[1], device=device)
    actions = torch.zeros(*shape, *envs.single_action_space.shape, device=device)
    logprobs, rewards, dones, values = (torch.zeros(shape, device=device) for _ in range(4))
    episode_reward = torch.zeros(args.num_envs, device=device)
    history: list[float] = []
    start_time = time.perf_counter()

    for iteration in range(args.iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.iterations)

        # Rollout. Ended environments have reset themselves, so `next_obs` may be of a new episode.
        finished = []
        for step in range(args.num_steps):
            obs[step] = next_obs
            with torch.no_grad():
                actions[step], logprobs[step], _ = agent.get_action(next_obs)
                values[step] = agent.get_value(next_obs)
            next_obs, reward, terminated, truncated, infos = envs.step(actions[step].clamp(-1, 1))
            next_obs = look(next_obs)
            rewards[step], dones[step] = reward, (terminated | truncated).float()

            episode_reward += reward
            ended = dones[step].bool()
            finished += episode_reward[ended].tolist()
            episode_reward[ended] = 0

            cut = truncated & ~terminated
            if cut.any():
                final = [infos["final_obs"][i] for i in cut.nonzero()[:, 0].tolist()]
                final = look({key: torch.stack([o[key] for o in final]) for key in final[0]})
                with torch.no_grad():
                    rewards[step, cut] += args.gamma * agent.get_value(final)

        # Generalised advantage estimation, backwards.
        with torch.no_grad():
            next_value = agent.get_value(next_obs)
        advantages = torch.zeros_like(rewards)
        advantage = torch.zeros(args.num_envs, device=device)
        for t in reversed(range(args.num_steps)):
            goes_on = 1 - dones[t]
            delta = rewards[t] + args.gamma * next_value * goes_on - values[t]
            advantage = delta + args.gamma * args.gae_lambda * goes_on * advantage
            advantages[t], next_value = advantage, values[t]

        # Update.
        b_obs, b_actions, b_logprobs = (x.flatten(0, 1) for x in (obs, actions, logprobs))
        b_advantages, b_returns = advantages.flatten(), (advantages + values).flatten()
        for _ in range(args.update_epochs):
            for mb in torch.randperm(len(b_obs), device=device).chunk(args.num_minibatches):
                _, logprob, entropy = agent.get_action(b_obs[mb], b_actions[mb])
                ratio = (logprob - b_logprobs[mb]).exp()
                mb_advantages = b_advantages[mb]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (
                    mb_advantages.std() + 1e-8
                )

                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped).mean()
                v_loss = 0.5 * (agent.get_value(b_obs[mb]) - b_returns[mb]).square().mean()
                loss = pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        history.append(float(np.mean(finished)))
        line = {
            "iteration": iteration,
            "steps": (iteration + 1) * args.num_steps * args.num_envs,
            "episodic_reward": round(history[-1], 4),
            "std": round(agent.actor_logstd.exp().mean().item(), 3),
            "seconds": round(time.perf_counter() - start_time, 1),
        }
        print(json.dumps(line), flush=True)

    envs.close()
    third = max(1, len(history) // 3)
    first, last = np.mean(history[:third]), np.mean(history[-third:])
    print(f"mean episodic {args.reward}: {first:.4f} in the first third, {last:.4f} in the last")
    return history


if __name__ == "__main__":
    main(tyro.cli(Args))
