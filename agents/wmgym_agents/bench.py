"""One RFT step at the published size: policy, world and optimizer as they are, weights at random.

This tells what a machine takes before anything is downloaded: 1.3 billion parameters of policy, 256
million of world, pictures of 256 pixels. The world's random weights are such that members imagine
different frames, as they do with trained ones: equal frames would be drawn once.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

import wmgym
from wmgym.bench_published import random_networks
from wmgym.distributed import processes
from wmgym.timing import peak_memory
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.tokens.transformer import TokenDynamics
from wmgym_agents.grpo import GRPO, GRPOConfig
from wmgym_agents.policy import PRESETS, FlowVLA, PolicyConfig
from wmgym_agents.vla_adapter import VLAAdapterConfig


@dataclass(frozen=True)
class BenchRFTConfig:
    """What to measure.

    Attributes:
        starts: Starts of the step.
        members: Members of a group.
        steps: RFT steps; the first one also checks and warms up.
        dtype: Arithmetic of the world, "float32" or "bfloat16".
        device: "auto", "cpu" or "cuda".
        tokenizer: Folder or name of the language model's tokenizer.
        suite: Suite of the shipped demonstrations that starts are drawn from.
        seed: Seed of weights, starts and noise.
        out: The report; none is written without.
    """

    starts: int = 1
    members: int = 16
    steps: int = 1
    dtype: str = "bfloat16"
    device: str = "auto"
    tokenizer: str = "Qwen/Qwen2.5-0.5B"
    suite: str = "libero_object"
    seed: int = 0
    out: Path | None = None


Networks: TypeAlias = tuple[CompressiveTokenizer, TokenDynamics]


def bench_rft(
    config: BenchRFTConfig,
    *,
    shape: PolicyConfig | None = None,
    networks: Callable[[int], Networks] = random_networks,
) -> dict[str, Any]:
    """Measures RFT steps.

    Args:
        config: What to measure.
        shape: Shape of the policy; None: the published one.
        networks: Makes the world's networks from a seed.

    Returns:
        `steps`: the figures of every step, times of its phases among them; the parameters of
        policy and world, what of them is trained, and `peak_memory_gib`.
    """
    with tempfile.TemporaryDirectory() as folder, processes(config.device) as here:
        policy = Path(folder) / "policy"
        counts = _save_policy(policy, config, shape)
        with peak_memory(here.device) as peak:
            tokenizer, dynamics = networks(config.seed)
            world = TokenWorld(
                tokenizer,
                dynamics,
                ActionTokens(),
                name="published",
                device=here.device,
                dtype=config.dtype,
            )
            settings = GRPOConfig(
                policy=str(policy),
                out=Path(folder) / "run",
                suite=config.suite,
                steps=config.steps,
                starts=config.starts,
                members=config.members,
                micro_starts=1,
                warmup=0,
                film_every=0,
                device=config.device,
                dtype=config.dtype,
                seed=config.seed,
            )
            job = GRPO(settings, here, world=world)
            trained = sum(w.numel() for weights in job.trained.values() for w in weights)
            steps = [job.step() for _ in range(config.steps)]
            job.close()
    world_count = sum(w.numel() for m in (tokenizer, dynamics) for w in m.parameters())
    return {
        "device": here.device.type,
        "dtype": config.dtype,
        "starts": config.starts,
        "members": config.members,
        "parameters": {**counts, "world": world_count, "trained": trained},
        "steps": [{k: round(v, 4) for k, v in step.items()} for step in steps],
        "peak_memory_gib": round(peak(), 2),
    }


def _save_policy(
    folder: Path, config: BenchRFTConfig, shape: PolicyConfig | None
) -> dict[str, int]:
    """Writes a policy of published shape with random weights; returns its parameters."""
    if shape is None:
        encoder = dataclasses.replace(VLAAdapterConfig(), tokenizer=config.tokenizer)
        shape = dataclasses.replace(PRESETS["vla-adapter"], encoder=encoder)
    statistics = FlowVLA.from_pretrained("libero-object-small").statistics
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy = FlowVLA(shape, statistics)
    policy.save_pretrained(folder, version=wmgym.__version__, half=True)
    head = sum(w.numel() for w in policy.head.parameters())
    return {"policy": sum(w.numel() for w in policy.parameters()), "head": head}
