"""Trains the published tokenizer: L1 + LPIPS on all frames of a clip, then against a discriminator.

The recipe is that of RLVR-World (arXiv 2505.13934), whose world model VLA-RFT took over: 600,000
steps of 16 clips (a context frame up to 15 steps back, and 8 frames), AdamW at 5e-4 with cosine
decay, a discriminator from step 10,000 on with weight 0.1 and gradient penalty 10, bfloat16. The
objective is in `objective.py`, the discriminator in `discriminator.py`.

Departures: the discriminator, whose own are written there, goes down in every step on what the
tokenizer has just drawn, and computes in float32; the learning rate ends at 2 % of its peak instead
of 0; augmentation as in `augment.py`; validation on whole episodes, not on every hundredth file.
`PRESETS["small"]` is a narrower network at 128 pixels for two CPU cores, with AlexNet's LPIPS.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmgym.distributed import Processes, processes
from wmgym.rewards.perceptual import LPIPS
from wmgym.run import CHECKPOINT, Run, adamw, descend, settings_of
from wmgym.training import computing, fingerprints, train_steps, warmup_cosine
from wmgym.worlds.evaluate import MAX_PSNR
from wmgym.worlds.metrics import psnr
from wmgym.worlds.tokens.clips import Clips
from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
from wmgym.worlds.tokens.discriminator import Discriminator, DiscriminatorConfig
from wmgym.worlds.tokens.objective import (
    gradient_penalty,
    hinge_of_discriminator,
    hinge_of_tokenizer,
    picture_terms,
)
from wmgym.worlds.tokens.recipe import (
    Means,
    Recipe,
    micro_batches,
    open_clips,
    write_notes,
)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(Recipe):
    """How a tokenizer is trained; the defaults are the published recipe.

    Attributes:
        tokenizer: Shape of the network.
        discriminator: Shape of the discriminator.
        lpips: Network of LPIPS, "vgg" or "alex".
        lpips_weight: Weight of LPIPS beside L1.
        adversarial_weight: Weight of the discriminator's opinion; 0 trains without one.
        adversarial_from: First step at which there is a discriminator.
        discriminator_rate: Peak of its learning rate.
        penalty: Weight of its gradient penalty.
    """

    steps: int = 600_000
    batch_size: int = 16
    micro_batch: int = 1
    learning_rate: float = 5e-4
    frames: int = 8
    context_lead: int = 15
    tokenizer: CompressiveTokenizerConfig = field(default_factory=CompressiveTokenizerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    lpips: str = "vgg"
    lpips_weight: float = 1.0
    adversarial_weight: float = 0.1
    adversarial_from: int = 10_000
    discriminator_rate: float = 5e-4
    penalty: float = 10.0


PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {
        "tokenizer": CompressiveTokenizerConfig(
            block_out_channels=(32, 64, 64, 128), layers_per_block=1, resolution=128
        ),
        "discriminator": DiscriminatorConfig(width=128, depth=4),
        "steps": 10_000,
        "batch_size": 4,
        "micro_batch": 4,
        "frames": 3,
        "warmup": 200,
        "ema": 0.999,
        "lpips": "alex",
        "adversarial_from": 5000,
        "validate_every": 500,
        "save_every": 100,
        "bfloat16": False,
    },
}
"""Changes to the defaults by name."""


class TokenizerTrainer:
    """A run with all that its steps need.

    Args:
        config: How to train.
        model: The tokenizer before its first step.
        clips: Training and validation clips.
        here: The processes of the run.

    Attributes:
        run: The run.
        discriminator: What plays against the tokenizer.
        discriminator_optimizer: Its optimizer.
    """

    def __init__(
        self,
        config: TokenizerTraining,
        model: CompressiveTokenizer,
        clips: tuple[Clips, Clips],
        here: Processes,
    ) -> None:
        self.config, self.here = config, here
        self.clips, self.held = clips
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = Discriminator(config.discriminator, model.config.resolution)
        model.to(here.device).train()
        self.discriminator.to(here.device)
        self.discriminator_optimizer = adamw(
            self.discriminator, config.discriminator_rate, config.weight_decay, config.betas
        )
        self.run = Run(
            model,
            copy.deepcopy(model).requires_grad_(False) if config.ema else None,
            adamw(model, config.learning_rate, config.weight_decay, config.betas),
            settings_of(config) | {"data_fingerprints": fingerprints(config.data)},
            extra_state={
                "discriminator": self.discriminator,
                "opposition": self.discriminator_optimizer,  # its name in checkpoints
            },
        )
        dtype = torch.bfloat16 if config.bfloat16 else torch.float32
        self.lpips = LPIPS(config.lpips, dtype=dtype, micro_batch=1 + config.frames)
        self.lpips.to(here.device)

    def step(self) -> dict[str, float]:
        """One optimizer step of the tokenizer and, when its time has come, of the discriminator."""
        config, run = self.config, self.run
        shape = warmup_cosine(run.step, config.steps, 1.0, config.warmup)
        plays = config.adversarial_weight > 0 and run.step >= config.adversarial_from
        means, seen = Means(), []
        mine = micro_batches(config, self.clips, run.step, self.here)

        def losses() -> Iterator[Tensor]:
            for part in mine:
                real = self.clips.pictures(part.rows, part.seeds)
                with computing(self.here.device, part.seeds[0], bfloat16=config.bfloat16):
                    drawn = run.model.reconstruct(real).float()
                terms = picture_terms(drawn, real, self.lpips)
                loss = (
                    terms["context_l1"]
                    + terms["later_l1"]
                    + config.lpips_weight * (terms["context_lpips"] + terms["later_lpips"])
                )
                if plays:
                    terms["adversarial"] = hinge_of_tokenizer(
                        self.discriminator(drawn.flatten(0, 1))
                    )
                    loss = loss + config.adversarial_weight * terms["adversarial"]
                    seen.append((real.flatten(0, 1), drawn.detach().flatten(0, 1)))
                means.add({"loss": loss, **terms})
                yield loss / len(mine)

        def opposing() -> Iterator[Tensor]:
            for real, drawn in seen:
                real.requires_grad_()
                logits = self.discriminator(real)
                terms = {
                    "discriminator": hinge_of_discriminator(logits, self.discriminator(drawn)),
                    "penalty": gradient_penalty(logits, real),
                }
                means.add(terms)
                yield (terms["discriminator"] + config.penalty * terms["penalty"]) / len(mine)

        rate = config.learning_rate * shape
        norm = run.descend(losses(), rate, clip=config.clip, ema=config.ema, here=self.here)
        if plays:
            descend(
                self.discriminator_optimizer,
                list(self.discriminator.parameters()),
                opposing(),
                config.discriminator_rate * shape,
                clip=config.clip,
                step=run.step,
                here=self.here,
            )
            self.discriminator.update_spectral_norms()
        return means.over(self.here) | {"gradient_norm": float(norm), "learning_rate": rate}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Distances of held-out frames to what their tokens say, and how many codes that takes.

        The context frame is f0; `psnr` is of the frames after it, `codes` counts different dynamics
        tokens.
        """
        model = self.run.average_or_model.eval()
        means, codes = Means(), set()
        for row in self.held.spread(self.config.validation_windows):
            real = self.held.pictures([row])
            with computing(self.here.device, 0, bfloat16=self.config.bfloat16):
                context, later = model.encode(real)
                drawn = model.decode(context, later).float().clamp(0, 1)
            codes.update(later.unique().tolist())
            quality = psnr(drawn[0, 1:], real[0, 1:]).clamp(max=MAX_PSNR).mean()
            means.add({**picture_terms(drawn, real, self.lpips), "psnr": quality})
        self.run.model.train()
        return {**means.alone(), "codes": float(len(codes))}

    def keep(self) -> None:
        """Writes the tokenizer."""
        folder = self.config.out / "tokenizer"
        self.run.average_or_model.save_pretrained(folder)
        write_notes(folder, self.run)


def train_tokenizer(config: TokenizerTraining, *, progress: bool = True) -> Path:
    """Trains a tokenizer, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.

    Returns:
        Folder of the finished tokenizer, `config.out / "tokenizer"`.

    Raises:
        CheckpointError: The checkpoint in `config.out`, or `init_from`, cannot be used.
        DatasetError: A dataset's files are damaged.
        ValueError: The data have no episode to train on, or none to validate on.
        MissingWeightsError: The network of LPIPS is not installed.
        FloatingPointError: Loss or gradient is not finite.
    """
    if config.init_from is not None:
        model = CompressiveTokenizer.from_pretrained(config.init_from).requires_grad_(True)
        config = dataclasses.replace(config, tokenizer=model.config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = CompressiveTokenizer(config.tokenizer)
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here:
        clips = open_clips(config, config.tokenizer.resolution, here, progress=progress)
        trainer = TokenizerTrainer(config, model, clips, here)
        trainer.run.resume(config.out / CHECKPOINT)
        train_steps(
            trainer.run,
            config,
            here,
            step=trainer.step,
            validate=trainer.validate,
            keep=trainer.keep,
            progress=progress,
            log_every=config.log_every,
        )
    return config.out / "tokenizer"
