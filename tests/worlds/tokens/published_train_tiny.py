"""Training runs of seconds, in this process or as a program.

`published_train_tiny.py tokenizer|dynamics DATA OUT [OPTION=VALUE ...]`; `pause=0.5` makes it
sleep for so many seconds after every step, so that it can be killed in between.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from wmgym.worlds.tokens import recipe
from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
from wmgym.worlds.tokens.discriminator import DiscriminatorConfig
from wmgym.worlds.tokens.train_dynamics import DynamicsTraining, train_dynamics
from wmgym.worlds.tokens.train_tokenizer import TokenizerTraining, train_tokenizer
from wmgym.worlds.tokens.transformer import TokenDynamicsConfig

STEPS = 8
TOKENIZER = CompressiveTokenizerConfig(
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    resolution=32,
    patch_size=8,
)
"""32 px, 256 context tokens, 4 dynamics tokens."""
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
    "validate_every": 4,
    "save_every": 3,
    "log_every": 1,
    "device": "cpu",
    "bfloat16": False,
}


def tokenizer_training(data: Path, out: Path, **changes) -> TokenizerTraining:
    values = {
        **SHARED,
        "tokenizer": TOKENIZER,
        "discriminator": DiscriminatorConfig(width=32, depth=3),
        "context_lead": 2,
        "lpips": "alex",
        "adversarial_from": 3,
        "ema": 0.9,
    }
    return TokenizerTraining(data=(data,), out=out, **{**values, **changes})


def dynamics_training(data: Path, out: Path, **changes) -> DynamicsTraining:
    values = {**SHARED, "dynamics": DYNAMICS, "ema": 0.9}
    return DynamicsTraining(data=(data,), out=out, **{**values, **changes})


def random_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CompressiveTokenizer(TOKENIZER).save_pretrained(folder)
    return folder


KINDS = {
    "tokenizer": (tokenizer_training, train_tokenizer),
    "dynamics": (dynamics_training, train_dynamics),
}


def main() -> None:
    kind, data, out, *options = sys.argv[1:]
    changes = dict(option.split("=", 1) for option in options)
    torch.set_num_threads(1)
    if pause := float(changes.pop("pause", "0")):
        micro_batches = recipe.micro_batches

        def slowly(*args):
            time.sleep(pause)
            return micro_batches(*args)

        module = sys.modules[KINDS[kind][1].__module__]
        module.micro_batches = slowly
    configure, train = KINDS[kind]
    train(configure(Path(data), Path(out), **changes), progress=False)


if __name__ == "__main__":
    main()
