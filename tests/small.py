"""A policy small enough for a test to train."""

from __future__ import annotations

import numpy as np
import torch
from wmgym_agents.chain import ChainConfig
from wmgym_agents.encoder import EncoderConfig
from wmgym_agents.flow_head import HeadConfig
from wmgym_agents.policy import FlowVLA, PolicyConfig

from wmgym.data.statistics import Statistics, VectorStatistics

CONFIG = PolicyConfig(
    encoder=EncoderConfig(image_size=32, widths=(8, 16), blocks=(1, 1), buckets=64),
    head=HeadConfig(chunk=4, context=16, embed=4, width=16, depth=2, heads=2),
    chain=ChainConfig(steps=4),
)


def statistics(seed=0):
    rng = np.random.default_rng(seed)
    return Statistics(
        action=VectorStatistics.of(rng.uniform(-0.8, 0.9, (500, 7)), mask=np.arange(7) < 6),
        proprio=VectorStatistics.of(rng.normal(size=(500, 8))),
        num_transitions=500,
        num_trajectories=5,
    )


def policy(config=CONFIG, *, seed=0, lively=0.1):
    """A policy with random weights; `lively` makes its output depend on everything."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FlowVLA(config, statistics())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * lively)
    return model.eval()


def observation(rows=3, *, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(rows, 8)).astype(np.float32),
        "instruction": [f"pick up thing {i} and put it in the basket" for i in range(rows)],
    }
