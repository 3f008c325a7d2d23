"""Supervised fine-tuning: a policy learns to do what the demonstrations did.

The flow head is trained by conditional flow matching on recorded chunks. Where the demonstrations
were disturbed on purpose, what the expert meant is imitated, not what was executed (DART, Laskey et
al. 2017). Failed episodes and held-out initial states are never used; progress is told on episodes
of `validation_states`. One command for a laptop and for several GPUs (`torchrun`); a killed run
goes on to the same numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import wmgym
from wmgym.data import FrameCache, WindowSampler, open_dataset
from wmgym.data.episodes import EpisodeInfo
from wmgym.data.statistics import Statistics
from wmgym.distributed import Processes, processes
from wmgym.run import CHECKPOINT, Run, adamw, settings_of
from wmgym.settings import check_numbers
from wmgym.training import (
    TrainingConfig,
    computing,
    fingerprints,
    seed_of,
    split_caches,
    train_steps,
    warmup_cosine,
)
from wmgym_agents.augment import random_view
from wmgym_agents.policy import PRESETS as SHAPES
from wmgym_agents.policy import FlowVLA, PolicyConfig
from wmgym_agents.vla_adapter import VLAAdapterConfig, VLAAdapterEncoder

logger = logging.getLogger(__name__)

PolicyRun = Run[FlowVLA]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """How a policy is trained on demonstrations.

    Attributes:
        out: Folder of the run: checkpoints, log, and the policy in `policy/`.
        policy: Shape of the policy.
        init_from: Policy to go on from (shipped name or folder) instead of random weights; shape
            and statistics are then its own, not `policy` and those of `data`.
        pretrained: Whether the backbone of `vla-adapter` starts from the weights that DINOv2,
            SigLIP and Qwen2.5 were published with, downloaded where they are missing, instead of
            random ones. None: it does, where there is such a backbone and no `init_from`.
        batch_size: Observations per step, over all processes.
        draws: Flow times and noises per observation, which share its encoding.
        ema: Decay of the moving average of the weights, which is what is kept.
        validation_windows: Observations in a validation.
        seed: Seed of weights, windows, noise and augmentation.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    pretrained: bool | None = None
    steps: int = 10_000
    batch_size: int = 64
    draws: int = 4
    learning_rate: float = 5e-4
    validation_windows: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, ">= 1", "draws")
        if self.init_from is not None and self.policy not in SHAPES.values():
            raise ValueError(
                f"init_from={self.init_from!r} brings a shape of its own: leave out policy.*"
            )
        has_backbone = isinstance(self.policy.encoder, VLAAdapterConfig)
        if self.pretrained and (self.init_from is not None or not has_backbone):
            raise ValueError(
                "pretrained=True: only the backbone of vla-adapter has published weights, and "
                "init_from brings its own; leave one of them out"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "vla-adapter": {"policy": SHAPES["vla-adapter"], "learning_rate": 2e-5},
}
"""Defaults by name. All of `vla-adapter` is trained, at OpenVLA's rate for whole models (Kim et al.
2024, arXiv 2406.09246); VLA-Adapter's own 2e-4 is one for low-rank adapters."""


def usable(info: EpisodeInfo) -> bool:
    """Whether an episode may be imitated: it is not known to have failed."""
    return info.success is not False


class Examples:
    """Observations and the chunks that followed, out of a frame cache."""

    def __init__(self, cache: FrameCache, chunk: int, seed: int, device: torch.device) -> None:
        self.cache, self.chunk, self.device = cache, chunk, device
        self.sampler = WindowSampler(cache, horizon=chunk, seed=seed)

    def gather(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, list[str], Tensor]:
        """Pictures `(B, 3, H, W)` in [0, 1], proprio `(B, 8)`, instructions, chunks `(B, T, 7)`."""
        window = self.sampler.gather(rows, np.zeros((len(rows), 0), np.int64))
        frames = torch.from_numpy(window["frames"][:, 0]).to(self.device)
        return (
            frames.movedim(-1, 1).float() / 255,
            torch.from_numpy(window["proprio"][:, 0]).to(self.device),
            [self.cache.episodes[self.sampler.locate(row)[0]].instruction for row in rows],
            torch.from_numpy(window["clean_actions"]).to(self.device),
        )


def new_run(config: SFTConfig, device: torch.device) -> PolicyRun:
    """A run before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.init_from is not None:
            model = FlowVLA.from_pretrained(config.init_from)
        else:
            model = _new_model(config)
    model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    for module in (model.head.sigma_net, model.head.noise_head):
        module.requires_grad_(False)  # imitation says nothing about the noise
    optimizer = adamw(model, config.learning_rate, config.weight_decay)
    settings = settings_of(config) | {"data_fingerprints": fingerprints(config.data)}
    return Run(model, average, optimizer, settings)


def _new_model(config: SFTConfig) -> FlowVLA:
    statistics = Statistics.of(
        [open_dataset(path) for path in config.data],
        lambda info: usable(info) and not info.held_out,
    )
    shape = config.policy
    if config.pretrained is False or not isinstance(shape.encoder, VLAAdapterConfig):
        return FlowVLA(shape, statistics)
    encoder = dataclasses.replace(shape.encoder, download=True)
    model = FlowVLA(dataclasses.replace(shape, encoder=encoder), statistics)
    assert isinstance(model.encoder, VLAAdapterEncoder)
    if not (config.out / CHECKPOINT).exists():
        logger.info("loading the published weights of the backbone")
        model.encoder.load_pretrained()
    return model


@torch.no_grad()
def validate(model: FlowVLA, held: Examples, config: SFTConfig) -> dict[str, float]:
    """Flow loss, and mean distance of denoised chunks to the expert's in [-1, 1] units."""
    count = min(config.validation_windows, len(held.sampler))
    rows = np.linspace(0, len(held.sampler) - 1, count).astype(np.int64)
    generator = torch.Generator().manual_seed(config.seed)
    losses, errors = [], []
    for part in np.array_split(rows, math.ceil(count / 64)):
        pixels, proprio, instruction, actions = held.gather(part)
        image = (pixels.movedim(1, -1) * 255).round().to(torch.uint8)
        with torch.autocast(held.device.type, torch.bfloat16, enabled=config.bfloat16):
            seen = model.encode({"image": image, "proprio": proprio, "instruction": instruction})
            losses.append(model.flow_loss(seen, actions, generator).mean(dim=(1, 2)))
            acted = torch.from_numpy(model.act(seen, generator))
        errors.append((acted - actions.cpu()).abs()[..., :-1].mean(dim=(1, 2)))
    return {
        "flow_loss": round(float(torch.cat(losses).mean()), 5),
        "action_l1": round(float(torch.cat(errors).mean()), 5),
    }


def sft(config: SFTConfig, *, progress: bool = True) -> Path:
    """Trains a policy, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.

    Returns:
        Folder of the finished policy, `config.out / "policy"`.

    Raises:
        CheckpointError: The checkpoint in `config.out`, or `init_from`, cannot be used.
        DatasetError: A dataset's files are damaged.
        ValueError: The data have no episode to train on, or none to validate on.
        FloatingPointError: Loss or gradient is not finite.
        OSError: A file cannot be written.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here:
        if here.main:
            logger.info("preparing policy and demonstrations")
        run = new_run(config, here.device)
        run.resume(config.out / CHECKPOINT)
        encoder = run.model.config.encoder
        train_cache, validation_cache = split_caches(
            config.data,
            config.out / "cache",
            image_size=None if encoder.resizes else encoder.image_size,
            validation_states=config.validation_states,
            here=here,
            progress=progress,
            accepts=usable,
        )
        chunk = run.model.config.head.chunk
        examples = Examples(train_cache, chunk, config.seed, here.device)
        held = Examples(validation_cache, chunk, config.seed, here.device)
        train_steps(
            run,
            config,
            here,
            step=lambda: _step(run, examples, config, here),
            validate=lambda: validate(run.average_or_model, held, config),
            keep=lambda: _keep(config, run),
            progress=progress,
            shown="flow_loss",
            log_last=True,
        )
    return config.out / "policy"


def _step(
    run: PolicyRun, examples: Examples, config: SFTConfig, here: Processes
) -> dict[str, float]:
    """One optimizer step; returns the figures of the batch."""
    if config.batch_size % here.size:
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of the {here.size} processes"
        )
    rate = warmup_cosine(run.step, config.steps, config.learning_rate, config.warmup)
    places = range(config.batch_size)[here.rank :: here.size]
    rows = examples.sampler.indices(run.step, config.batch_size)[here.rank :: here.size]
    seeds = [seed_of(config.seed, run.step, place) for place in places]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pixels, proprio, instruction, actions = examples.gather(rows)
    with computing(here.device, seeds[0], bfloat16=config.bfloat16):
        view = random_view(run.model.resized(pixels), generators)
        seen = run.model.encode_pixels(view, proprio, instruction)
        loss = run.model.flow_loss(seen, actions, generators, config.draws).mean()
    norm = run.descend(loss, rate, clip=config.clip, ema=config.ema, here=here)
    return {
        "flow_loss": float(here.mean(loss.detach())),
        "gradient_norm": float(norm),
        "learning_rate": rate,
    }


def _keep(config: SFTConfig, run: PolicyRun) -> None:
    run.average_or_model.save_pretrained(
        config.out / "policy",
        version=wmgym.__version__,
        training=run.notes,
    )
