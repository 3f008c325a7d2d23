"""A training run of seconds, in this process or as a program: `train_tiny.py DATA OUT [SECONDS]`.

As a program it sleeps for so many seconds after every step, so that it can be killed in between.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tiny
import torch

from wmgym.worlds import train as module
from wmgym.worlds.train import TrainConfig, train

STEPS = 12


def config(data: Path, out: Path, **changes) -> TrainConfig:
    values = {
        "world": tiny.CONFIG,
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup": 4,
        "lead": 1,
        "validation_windows": 6,
        "validate_every": 6,
        "save_every": 5,
        "device": "cpu",
        "bfloat16": False,
    }
    return TrainConfig(data=(data,), out=out, **{**values, **changes})


def main() -> None:
    data, out, *pause = sys.argv[1:]
    torch.set_num_threads(1)
    if pause:
        step = module._step

        def slow_step(*args):
            figures = step(*args)
            time.sleep(float(pause[0]))
            return figures

        module._step = slow_step
    train(config(Path(data), Path(out)), progress=False)


if __name__ == "__main__":
    main()
