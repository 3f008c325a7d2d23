"""Training runs of seconds, in this process or as a program.

`published_train_tiny.py tokenizer DATA OUT [PAUSE]` sleeps for so many seconds before every step,
so that it can be killed in between. `published_train_tiny.py dynamics|sharded DATA OUT [STEP]` is
interrupted at that step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from wmgym.worlds.tokens import train_dynamics as dynamics_module
from wmgym.worlds.tokens import train_tokenizer as tokenizer_module
from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
from wmgym.worlds.tokens.discriminator import DiscriminatorConfig
from wmgym.worlds.tokens.train_dynamics import DynamicsTraining, train_dynamics
from wmgym.worlds.tokens.train_tokenizer import TokenizerTraining, train_tokenizer
from wmgym.worlds.tokens.transformer import TokenDynamicsConfig

STEPS = 6
TOKENIZER = CompressiveTokenizerConfig(
    block_out_channels=(16, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    resolution=32,
    max_att_resolution=8,
)
"""32 px, 64 context tokens, 4 dynamics tokens."""
DYNAMICS = TokenDynamicsConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
SHARED = {
    "steps": STEPS,
    "batch_size": 4,
    "micro_batch": 1,
    "learning_rate": 2e-3,
    "warmup": 4,
    "frames": 3,
    "validation_windows": 4,
    "validate_every": 3,
    "save_every": 2,
    "log_every": 1,
    "device": "cpu",
    "bfloat16": False,
    "ema": 0.9,
}


def tokenizer_training(data: Path, out: Path, **changes) -> TokenizerTraining:
    values = {
        **SHARED,
        "tokenizer": TOKENIZER,
        "discriminator": DiscriminatorConfig(width=32, depth=3),
        "context_lead": 2,
        "lpips": "alex",
        "adversarial_from": 2,
    }
    return TokenizerTraining(data=(data,), out=out, **{**values, **changes})


def dynamics_training(data: Path, out: Path, tokenizer: Path, **changes) -> DynamicsTraining:
    values = {**SHARED, "dynamics": DYNAMICS, "tokenizer": str(tokenizer)}
    return DynamicsTraining(data=(data,), out=out, **{**values, **changes})


def random_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CompressiveTokenizer(TOKENIZER).save_pretrained(folder)
    return folder


def interrupted(module, after: int, train) -> None:
    """Trains until so many steps are done, and then is interrupted."""
    before = module.micro_batches

    def shares(config, clips, step, here):
        if step == after:
            raise KeyboardInterrupt
        return before(config, clips, step, here)

    module.micro_batches = shares
    try:
        train()
    except KeyboardInterrupt:
        return
    finally:
        module.micro_batches = before
    raise AssertionError("was not interrupted")


def main() -> None:
    what, data, out, *pause = sys.argv[1:]
    data, out = Path(data), Path(out)
    torch.set_num_threads(1)
    if what == "tokenizer":
        if pause:
            before = tokenizer_module.micro_batches

            def slowly(*args):
                time.sleep(float(pause[0]))
                return before(*args)

            tokenizer_module.micro_batches = slowly
        train_tokenizer(tokenizer_training(data, out), progress=False)
        return
    changes = {"sharding": "fsdp", "ema": 0.0} if what == "sharded" else {}
    config = dynamics_training(data, out, random_tokenizer(out / "random"), **changes)
    if pause:
        interrupted(dynamics_module, int(pause[0]), lambda: train_dynamics(config, progress=False))
    else:
        train_dynamics(config, progress=False)


if __name__ == "__main__":
    main()
