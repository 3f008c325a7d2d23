"""A world on disk: a folder with `config.json` and `model.safetensors`.

`config.json` names the family, the shape of the network and where the weights come from; every
tensor must be used and every parameter present. Nothing is ever unpickled. `load_world` takes the
name of a world that ships with wmgym or the path of a folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wmgym.assets import asset_path
from wmgym.worlds.dynamics import DynamicsConfig
from wmgym.worlds.latent_world import LatentWorld, LatentWorldConfig, LatentWorldModel
from wmgym.worlds.tokenizer import TokenizerConfig
from wmgym.worlds.world import World

FAMILY = "wmgym-latent-world"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another family; the message says which."""


def save_world(
    folder: str | Path, model: LatentWorldModel, *, half: bool = False, **described: Any
) -> None:
    """Writes a world; each file appears complete or not at all.

    Args:
        folder: Made if missing.
        model: The network.
        half: Store matrices in bfloat16, half the size.
        **described: JSON values for `config.json`, such as how it was trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.to(torch.bfloat16) if half and t.ndim > 1 else t).detach().cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    part = folder / f"{WEIGHTS}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / WEIGHTS)
    config = {"family": FAMILY, "world": dataclasses.asdict(model.config), **described}
    part = folder / f"{CONFIG}.part"
    part.write_text(json.dumps(config, indent=2) + "\n")
    part.replace(folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a world's folder.

    Raises:
        CheckpointError: Missing, not JSON, or of another family.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        nested = f"; did you mean {folder / 'world'}?" if (folder / "world").is_dir() else ""
        raise CheckpointError(f"{folder} is no world: it has no {CONFIG}{nested}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    family = config["family"] if isinstance(config, dict) and "family" in config else None
    if family != FAMILY:
        raise CheckpointError(f"{path} says family={family!r}; supported is {FAMILY!r}")
    return config


def read_shape(folder: Path) -> LatentWorldConfig:
    """The shape of the network of a world's folder.

    Raises:
        CheckpointError: As in `read_config`, or the shape is not that of a world.
    """
    config = read_config(folder)
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


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a module from a safetensors file whose keys and shapes must match exactly.

    Raises:
        CheckpointError: The file is missing or damaged, keys or shapes differ, or a value is not
            finite.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
    check_fit(model.state_dict(), tensors, str(path))
    model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in tensors.items()})


def check_fit(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Checks that tensors have exactly the names and shapes of weights, and finite values.

    Args:
        weights: What is to be filled.
        tensors: What was read.
        source: Where it was read from, for the message.

    Raises:
        CheckpointError: They differ; the message says where.
    """
    expected = {name: tuple(t.shape) for name, t in weights.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        missing = sorted(expected.keys() - found.keys())[:5]
        unknown = sorted(found.keys() - expected.keys())[:5]
        other = [
            f"{k}: {found[k]} instead of {expected[k]}"
            for k in sorted(expected.keys() & found.keys())
            if expected[k] != found[k]
        ][:5]
        raise CheckpointError(
            f"{source} does not fit its config: missing {missing}, unknown {unknown}, "
            f"shapes {other}"
        )
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise CheckpointError(f"{source} has NaN or infinity in {broken[:5]}")


def shipped_worlds() -> list[str]:
    """Names of the worlds that ship with wmgym."""
    return sorted(p.parent.name for p in asset_path().glob(f"worlds/*/{CONFIG}"))


def world_folder(world: str | Path) -> Path:
    """Folder of a world given by name or path; a shipped name goes before a folder of that name.

    Raises:
        CheckpointError: Neither a shipped world nor a folder.
    """
    names = shipped_worlds()
    if str(world) in names:
        return asset_path("worlds", str(world))
    if Path(world).is_dir():
        return Path(world)
    raise CheckpointError(
        f"world={str(world)!r} is neither a folder nor one of the shipped worlds {names}"
    )


def load_world(
    world: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32"
) -> World:
    """Loads a frozen world.

    Args:
        world: Name of a shipped world, or a folder.
        device: Where to run it.
        dtype: `"float32"`, or `"bfloat16"` for the matrix products inside the networks.

    Raises:
        CheckpointError: The world is unknown, damaged, or does not fit its config.
    """
    folder = world_folder(world)
    return LatentWorld(load_model(folder), name=folder.name, device=device, dtype=dtype)
