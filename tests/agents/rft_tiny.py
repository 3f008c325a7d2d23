"""A run of GRPO of seconds, in this process or as a program: `rft_tiny.py POLICY OUT [SECONDS]`.

As a program it sleeps for so many seconds after every step, so that it can be killed in between.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from toy import ToyDataset, ToyWorld
from wmgym_agents.grpo import GRPO, GRPOConfig, grpo

STEPS = 4
STARTS = 6
"""Parts of 2 starts divide those of one process, not those of two."""


def config(policy: Path, out: Path, **changes) -> GRPOConfig:
    values = {
        "steps": STEPS,
        "starts": 4,
        "members": 4,
        "micro_starts": 2,
        "save_every": 2,
        "film_every": 0,
        "learning_rate": 1e-3,
        "sigma_learning_rate": 1e-3,
        "warmup": 0,
        "device": "cpu",
    }
    return GRPOConfig(policy=str(policy), out=out, **{**values, **changes})


def toy(**kwargs):
    """Arguments of a toy environment."""
    return {
        "world": ToyWorld(),
        "dataset": ToyDataset(),
        "tasks": None,
        "reward_weights": {"lpips": 0.0},
        **kwargs,
    }


def main() -> None:
    policy, out, *pause = sys.argv[1:]
    torch.set_num_threads(1)
    if pause:
        step = GRPO.step

        def slow_step(self):
            figures = step(self)
            time.sleep(float(pause[0]))
            return figures

        GRPO.step = slow_step
    grpo(config(Path(policy), Path(out), starts=STARTS), progress=False, **toy())


if __name__ == "__main__":
    main()
