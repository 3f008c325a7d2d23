"""A world on disk: of the small family, `wmgym.checkpoints` with its shape, or of the published.

What a folder holds is told by its `config.json`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from wmgym.checkpoints import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    digest_of,
    load_weights,
    model_folder,
    read_config,
    save_model,
    shipped,
)
from wmgym.worlds.dynamics import DynamicsConfig
from wmgym.worlds.latent_world import LatentWorld, LatentWorldConfig, LatentWorldModel
from wmgym.worlds.tokenizer import TokenizerConfig
from wmgym.worlds.tokens.load import (
    dynamics_in,
    fetch,
    files_beside,
    files_of,
    is_published,
    load_token_world,
)
from wmgym.worlds.world import World

FAMILY = "wmgym-latent-world"


def save_world(
    folder: str | Path, model: LatentWorldModel, *, half: bool = False, **described: Any
) -> None:
    """Writes a world.

    Args:
        folder: Made if missing.
        model: The network.
        half: Store matrices in bfloat16, half the size.
        **described: JSON values for `config.json`, such as how it was trained.
    """
    config = {"family": FAMILY, "world": dataclasses.asdict(model.config), **described}
    save_model(folder, model, config, half=half)


def read_shape(folder: Path) -> LatentWorldConfig:
    """The shape of the network of a world's folder.

    Raises:
        CheckpointError: As in `read_config`, or the shape is not that of a world.
    """
    config = read_config(folder, "world", FAMILY)
    try:
        shape = config["world"]
        return LatentWorldConfig(
            tokenizer=TokenizerConfig(**shape["tokenizer"]),
            dynamics=DynamicsConfig(**shape["dynamics"]),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _foreign(folder, error) from None


def load_model(folder: str | Path) -> LatentWorldModel:
    """The network of a world's folder, in float32 on the CPU.

    Raises:
        CheckpointError: The folder is missing, damaged, or does not fit.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    with torch.random.fork_rng(devices=[]):
        try:
            model = LatentWorldModel(shape)
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise _foreign(folder, error) from None
    load_weights(model, folder / WEIGHTS)
    return model


def _foreign(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / CONFIG} does not describe a world: {error!r}")


def world_folder(world: str | Path) -> Path:
    """Folder of a world by the name of one that ships, by path, or by id on the hub.

    Raises:
        CheckpointError: There is none.
    """
    name = str(world)
    if name in shipped("world") or Path(world).is_dir() or name.count("/") != 1:
        return dynamics_in(model_folder("world", world))
    return fetch(name)


def world_files(folder: Path) -> list[Path]:
    """The files that the world in a folder may be made of, there or not."""
    return [folder / CONFIG, folder / WEIGHTS, *files_beside(folder)]


def world_digest(world: str | Path) -> str:
    """What changes when the contents of a world's files do; the world as in `load_world`.

    Raises:
        CheckpointError: There is none.
    """
    folder = world_folder(world)
    if is_published(folder):
        return digest_of(files_of(_named(world, folder)))
    return digest_of([folder / CONFIG, folder / WEIGHTS])


def _named(world: str | Path, folder: Path) -> str | Path:
    """What the published layout knows a world by: the folder of one that ships, else as given."""
    return folder if str(world) in shipped("world") else world


def load_world(
    world: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> World:
    """Loads a frozen world.

    Args:
        world: Name of a shipped world, a folder, or the id of a Hugging Face repository.
        device: Where to run it.
        dtype: `"float32"`, or `"bfloat16"` for the matrix products inside the networks.

    Raises:
        CheckpointError: The world is unknown, damaged, or does not fit its config.
    """
    folder = world_folder(world)
    if is_published(folder):
        return load_token_world(_named(world, folder), device=device, dtype=dtype)
    return LatentWorld(load_model(folder), name=folder.name, device=device, dtype=dtype)
