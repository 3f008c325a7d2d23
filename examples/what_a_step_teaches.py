"""What a step of GRPO teaches: its gradient against that of the policy's error.

    python examples/what_a_step_teaches.py --dataset data/libero_object

GRPO wants a policy to come closer to the recorded actions, by way of rewards. How much of a step
goes there? Nothing is trained here: batch after batch is drawn from the same weights, and the
gradient of each is compared with the gradient, over many starts, of the mean distance between the
policy's chunks and the recorded ones. Of chunks denoised from noise, as the published protocol has
policies act, and of those denoised from no noise, at temperature 0.

A cosine near 0 is a step that goes anywhere; for directions drawn at random it would be within
0.001. It is told for rewards, and for groups whose members denoise from noise of their own or from
the same one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from wmgym_agents import FlowVLA, GRPOConfig
from wmgym_agents.grpo import GRPO, PRESETS
from wmgym_agents.objective import policy_loss
from wmgym_agents.watch import observation

from wmgym.distributed import processes
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.reports import write_report


@dataclass
class Args:
    """Cosines of GRPO's gradients with that of the policy's error."""

    policy: str = "libero-object-small"
    """name of a shipped policy, or a folder"""
    dataset: Path | None = None
    """demonstrations; None: those that ship"""
    suite: str = "libero_object"
    """LIBERO suite"""
    rewards: tuple[str, ...] = ("R1", "R3")
    """rewards of GRPO"""
    batches: int = 24
    """batches of each kind, of the size that preset `small` has"""
    starts: int = 768
    """starts of the gradient that they are compared with"""
    seed: int = 0
    """seed of starts and noise"""
    out: Path | None = None
    """JSON file of the figures"""


def main(args: Args, **env_kwargs: Any) -> list[dict[str, Any]]:
    """Prints a line for each kind of batch.

    Args:
        args: Settings.
        **env_kwargs: Further arguments of the environments.

    Returns:
        For every kind its `reward`, `shared_start`, and for `noise` and `no_noise`: the `mean`
        cosine of a batch, its standard `error`, and `together`, the cosine of the mean gradient.
    """
    rows = []
    for reward in args.rewards:
        for shared in (False, True):
            figures = _cosines(args, reward, shared, env_kwargs)
            rows.append({"reward": reward, "shared_start": shared, **figures})
            told = "  ".join(
                f"{name}: {f['mean']:+.3f} ± {f['error']:.3f}, together {f['together']:+.2f}"
                for name, f in figures.items()
            )
            print(f"{reward}, shared_start={shared}: {told}", flush=True)
    if args.out is not None:
        command = f"python examples/what_a_step_teaches.py --policy {args.policy} --dataset "
        command += f"{args.dataset} --batches {args.batches} --starts {args.starts}"
        write_report(args.out, {"cosines": rows}, command=command, seed=args.seed)
    return rows


def _cosines(
    args: Args, reward: str, shared: bool, env_kwargs: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """The figures of one kind of batch."""
    with tempfile.TemporaryDirectory() as folder, processes("cpu") as here:
        preset = PRESETS["small"] | {"reward": reward, "shared_start": shared}
        config = GRPOConfig(
            policy=args.policy,
            out=Path(folder),
            suite=args.suite,
            dataset=args.dataset,
            seed=args.seed,
            **preset,
        )
        job = GRPO(config, here, **env_kwargs)
        wanted = {
            name: _gradient_of_error(args, job, temperature)
            for name, temperature in (("noise", 1.0), ("no_noise", 0.0))
        }
        batches = [_gradient_of_batch(job, number) for number in range(args.batches)]
        job.close()
    figures = {}
    for name, direction in wanted.items():
        each = [_cosine(batch, direction) for batch in batches]
        figures[name] = {
            "mean": float(np.mean(each)),
            "error": float(np.std(each, ddof=1) / np.sqrt(len(each))),
            "together": _cosine(torch.stack(batches).mean(0), direction),
        }
    return figures


def _gradient_of_batch(job: GRPO, number: int) -> Tensor:
    """Gradient of the policy loss of one batch."""
    job.run.step = number  # which starts and noise are drawn
    decisions, rewards, _ = job.rollout()
    (decision,), (advantages,) = decisions, job.advantages(rewards)
    new, _ = job.policy.log_prob(decision.seen, decision.chain)
    old = decision.chain.log_prob
    loss, _ = policy_loss(new, old, advantages.flatten(), job.config.clip)
    return _gradient(job, loss)


def _gradient_of_error(args: Args, job: GRPO, temperature: float) -> Tensor:
    """Gradient of the mean distance of denoised chunks to the recorded ones."""
    kwargs = {**job.env_kwargs, "reward": "R1", "reward_every": 1}
    envs = WorldModelVectorEnv(args.starts, **kwargs)
    seen, info = envs.reset(seed=args.seed + 1)
    with torch.no_grad():
        encoded = job.policy.encode(observation(seen, info))
    recorded = torch.as_tensor(info["reference_action"]).float()
    generator = torch.Generator().manual_seed(args.seed)
    x = temperature * torch.randn(recorded.shape, generator=generator)
    x = denoised(job.policy, x, encoded.tokens, encoded.proprio)
    envs.close()
    return _gradient(job, (x - job.policy.action_scale.to_unit(recorded)).abs().mean())


def denoised(policy: FlowVLA, x: Tensor, tokens: Tensor, proprio: Tensor) -> Tensor:
    """Chunks `(B, T, 7)` that the flow makes of noise, differentiable in the policy."""
    steps = policy.config.chain.steps
    for number in range(steps):
        t = torch.full((len(x),), number / steps)
        x = x - policy.head.velocity(x, t, tokens, proprio) / steps
    return x


def _gradient(job: GRPO, loss: Tensor) -> Tensor:
    """Gradient of the weights that make actions, but not their noise."""
    modules = ("action_head", "noisy_action_projector", "proprio_projector")
    weights = [weight for name in modules for weight in job.trained[name]]
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


if __name__ == "__main__":
    main(tyro.cli(Args))
