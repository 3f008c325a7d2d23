"""A world small enough for a test to train, and a dataset it can learn: a square that is pushed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wmgym.data.episodes import Episode, EpisodeInfo
from wmgym.data.lerobot_writer import assemble, stage_episode
from wmgym.worlds.dynamics import DynamicsConfig
from wmgym.worlds.latent_world import LatentWorld, LatentWorldConfig, LatentWorldModel
from wmgym.worlds.tokenizer import TokenizerConfig

SIZE = 32
HORIZON = 4
CONFIG = LatentWorldConfig(
    tokenizer=TokenizerConfig(
        image_size=SIZE,
        patch=4,
        width=32,
        heads=2,
        encoder_layers=1,
        summary_layers=1,
        decoder_layers=1,
        fine_layers=1,
        slots=2,
        latent=8,
    ),
    dynamics=DynamicsConfig(horizon=HORIZON, layers=1, heads=2),
)
INIT_STATES = (0, 1, 2, 25, 25, 40, 41)
"""Initial states of the episodes: three to train on, two to validate on, two held out."""
LENGTH = 14


def model(config: LatentWorldConfig = CONFIG, *, seed: int = 0, lively: float = 0.1):
    """A network with random weights; `lively` makes it do more than copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LatentWorldModel(config)
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight) * lively)
    return network


def world(config: LatentWorldConfig = CONFIG, *, seed: int = 0, **kwargs) -> LatentWorld:
    return LatentWorld(model(config, seed=seed), name="tiny", **kwargs)


def rows(
    count: int, steps: int, *, size: int = SIZE, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Context frames `(B, 2, 3, H, W)`, proprio `(B, 2, 8)` and actions `(B, T, 7)`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count * 2, 3, 8, 8, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (
        frames.view(count, 2, 3, size, size),
        torch.randn(count, 2, 8, generator=generator) * 0.1,
        torch.rand(count, steps, 7, generator=generator) * 2 - 1,
    )


def episode(number: int, *, length: int = LENGTH, size: int = SIZE) -> Episode:
    """The first two dimensions of the action push a square across a gradient."""
    rng = np.random.default_rng([3, number])
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    place = np.cumsum(np.vstack([rng.uniform(0.4, 0.6, (1, 2)), 0.08 * actions[:-1, :2]]), 0)
    place = place.clip(0.15, 0.85)
    axis = (np.arange(size) + 0.5) / size
    inside = (np.abs(axis[None, :, None] - place[:, 1, None, None]) < 0.12) & (
        np.abs(axis[None, None, :] - place[:, 0, None, None]) < 0.12
    )
    ground = np.broadcast_to(
        np.stack([60 + 80 * axis, 90 + 0 * axis, 140 - 80 * axis], -1), (length, size, size, 3)
    )
    images = np.where(inside[..., None], np.array([240.0, 220.0, 40.0]), ground).astype(np.uint8)
    proprio = np.zeros((length, 8), np.float32)
    proprio[:, :2] = place
    proprio[:, 2:] = rng.normal(0, 0.01, (length, 6))
    return Episode(
        info=EpisodeInfo(
            episode_id=0,
            length=length,
            instruction="push the square",
            suite="libero_object",
            task_id=number % 2,
            init_state_id=INIT_STATES[number],
            seed=number,
            success=number != 1,
        ),
        start=0,
        images=images,
        proprio=proprio,
        actions=actions,
        wrist_images=images[:, ::-1].copy(),
        sim_states=rng.normal(size=(length, 5)),
    )


def write_dataset(folder: Path, *, length: int = LENGTH) -> Path:
    """A LeRobot dataset of one episode for each of `INIT_STATES`, at `folder / "tiny"`."""
    names = [f"episode-{i}" for i in range(len(INIT_STATES))]
    for i, name in enumerate(names):
        stage_episode(folder / "staging", name, episode(i, length=length))
    return assemble(folder / "staging", folder / "tiny", names)
