"""Trains the small world on recorded demonstrations.

One command for a laptop and for several GPUs (`torchrun`). What optimizer step `s` sees depends on
the seed and `s` alone, so a run that was killed goes on to the same numbers, and the number of
processes changes them only by rounding. The weights that are evaluated and kept are an exponential
moving average. Held-out initial states are never read here; what is reported while training comes
from episodes of `validation_states`.

This file and `wmgym.worlds.evaluate` are the commands of this room and the only ones in it that
look beyond it, at LPIPS in `wmgym.rewards`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import wmgym
from wmgym.checkpoints import model_folder
from wmgym.data import FrameCache
from wmgym.distributed import Processes, processes
from wmgym.rewards.perceptual import LPIPS
from wmgym.run import CHECKPOINT, Run, adamw, settings_of
from wmgym.training import TrainingConfig, fingerprints, split_caches, train_steps, warmup_cosine
from wmgym.worlds.batches import Windows, go_on
from wmgym.worlds.checkpoints import load_model, read_shape, save_world
from wmgym.worlds.evaluate import MAX_PSNR
from wmgym.worlds.film import film
from wmgym.worlds.latent_world import LatentWorld, LatentWorldConfig, LatentWorldModel
from wmgym.worlds.metrics import psnr
from wmgym.worlds.objective import LossWeights, Objective

WorldRun = Run[LatentWorldModel]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig):
    """How a world is trained.

    Attributes:
        out: Folder of the run: checkpoints, log, and the world in `world/`.
        world: Shape of the network.
        init_from: World to go on from (shipped name or folder) instead of random weights; its shape
            replaces `world`.
        batch_size: Windows per step, over all processes.
        loss: Weights of the loss.
        lead: Most chunks that the network imagines itself before the one it is trained on, so that
            it learns to go on from its own frames. Grows from 0 over the first half of the run.
        seed: Seed of the weights and of the windows.
    """

    world: LatentWorldConfig = field(default_factory=LatentWorldConfig)
    steps: int = 20_000
    batch_size: int = 16
    learning_rate: float = 6e-4
    loss: LossWeights = field(default_factory=LossWeights)
    lead: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lead < 0:
            raise ValueError(f"lead={self.lead}: allowed are integers >= 0")


def new_run(config: TrainConfig, cache: FrameCache, device: torch.device) -> WorldRun:
    """A run before its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.init_from is not None:
            model = load_model(model_folder("world", config.init_from))
        else:
            model = LatentWorldModel(config.world)
            _fit_scales(model, cache)
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw(model, config.learning_rate, config.weight_decay)
    settings = settings_of(config) | {"data_fingerprints": fingerprints(config.data)}
    return Run(model, average, optimizer, settings)


def _fit_scales(model: LatentWorldModel, cache: FrameCache) -> None:
    """Units of the proprioception: its mean and spread, and the spread of its change per step."""
    proprio = torch.from_numpy(np.asarray(cache.proprio))
    inside = torch.ones(len(proprio) - 1, dtype=torch.bool)
    inside[torch.from_numpy(cache.starts[1:-1] - 1)] = False
    change = (proprio[1:] - proprio[:-1])[inside]
    dynamics = model.dynamics
    dynamics.get_buffer("proprio_mean").copy_(proprio.mean(0))
    dynamics.get_buffer("proprio_std").copy_(proprio.std(0).clamp_min(1e-4))
    dynamics.get_buffer("change_std").copy_(change.std(0).clamp_min(1e-5))


@torch.no_grad()
def validate(
    model: LatentWorldModel, windows: Windows, lpips: LPIPS, config: TrainConfig
) -> dict[str, float]:
    """PSNR and LPIPS of the imagined last frame of evenly spread windows, beside copying.

    Names that begin with `far_` are those of the last frame after `config.lead` more chunks.
    """
    model.eval()
    figures = _score(model, windows, lpips, config, 0)
    if config.lead:
        far = _score(model, windows, lpips, config, config.lead)
        figures |= {f"far_{name}": value for name, value in far.items()}
    model.train()
    return figures


def _score(
    model: LatentWorldModel, windows: Windows, lpips: LPIPS, config: TrainConfig, lead: int
) -> dict[str, float]:
    total = len(windows.samplers[lead])
    count = min(config.validation_windows, total)
    rows = np.linspace(0, total - 1, count).astype(np.int64)
    figures: dict[str, list[Tensor]] = {"psnr": [], "copy_psnr": [], "lpips": [], "copy_lpips": []}
    for part in np.array_split(rows, math.ceil(count / 16)):
        recorded = windows.gather(part, (windows.horizon,), lead)
        target = recorded.targets[:, -1]
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=config.bfloat16):
            batch = go_on(model, recorded)
            drawn, _ = model.imagine_last(batch.context, batch.proprio, batch.actions)
        figures["psnr"].append(psnr(drawn, target).clamp(max=MAX_PSNR))
        figures["copy_psnr"].append(psnr(recorded.context, target).clamp(max=MAX_PSNR))
        figures["lpips"].append(lpips(drawn, target))
        figures["copy_lpips"].append(lpips(recorded.context, target))
    return {name: round(float(torch.cat(parts).mean()), 4) for name, parts in figures.items()}


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Trains a world, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.

    Returns:
        Folder of the finished world, `config.out / "world"`.

    Raises:
        CheckpointError: The checkpoint in `config.out`, or `init_from`, cannot be used.
        DatasetError: A dataset's files are damaged.
        ValueError: The data have no episode to train on, or none to validate on.
        FloatingPointError: The gradient is not finite.
    """
    if config.init_from is not None:
        shape = read_shape(model_folder("world", config.init_from))
        config = dataclasses.replace(config, world=shape)
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here:
        train_cache, validation_cache = split_caches(
            config.data,
            config.out / "cache",
            image_size=config.world.tokenizer.image_size,
            validation_states=config.validation_states,
            here=here,
            progress=progress,
        )
        run = new_run(config, train_cache, here.device)
        run.resume(config.out / CHECKPOINT)
        lpips = LPIPS(dtype=torch.bfloat16 if config.bfloat16 else torch.float32).to(here.device)
        objective = Objective(run.model, config.loss, lpips, here.mean)
        horizon = run.model.config.dynamics.horizon
        windows = Windows(train_cache, horizon, config.seed, here.device, config.lead)
        held = Windows(validation_cache, horizon, config.seed, here.device, config.lead)

        def watch() -> dict[str, float]:
            scores = validate(run.average_or_model, held, lpips, config)
            world = LatentWorld(run.average_or_model, name=config.out.name, device=here.device)
            film(world, validation_cache, config.out / f"imagined-{run.step:06d}.mp4")
            return scores

        train_steps(
            run,
            config,
            here,
            step=lambda: _step(run, objective, windows, config, here),
            validate=watch,
            keep=lambda: _keep(config, run),
            progress=progress,
            shown="imagined_l1",
        )
    return config.out / "world"


def _keep(config: TrainConfig, run: WorldRun) -> None:
    save_world(
        config.out / "world",
        run.average_or_model,
        version=wmgym.__version__,
        training=run.notes,
    )


def _step(
    run: WorldRun, objective: Objective, windows: Windows, config: TrainConfig, here: Processes
) -> dict[str, float]:
    """One optimizer step; returns the figures of the batch."""
    rate = warmup_cosine(run.step, config.steps, config.learning_rate, config.warmup)
    lead = round(config.lead * min(1.0, 2 * run.step / config.steps))
    batch = windows.batch(run.step, config.batch_size, here, lead=lead)
    with torch.autocast(here.device.type, torch.bfloat16, enabled=config.bfloat16):
        loss, terms = objective(go_on(run.average_or_model, batch))
    norm = run.descend(loss, rate, clip=config.clip, ema=config.ema, here=here)
    figures = {name: float(here.mean(term)) for name, term in terms.items()}
    return figures | {"gradient_norm": float(norm), "learning_rate": rate}
