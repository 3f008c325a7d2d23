"""A model on disk: a folder with `config.json` and `model.safetensors`.

`config.json` names the family, the shape of the network and where the weights come from; every
tensor must be used and every parameter present. Nothing is ever unpickled, and files appear
complete or not at all. Models go by the name of one that ships with wmgym or by the path of a
folder.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wmgym.assets import asset_path
from wmgym.files import complete, write_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"

Kind = Literal["world", "policy"]
_SHIPPED: dict[Kind, str] = {"world": "worlds", "policy": "policies"}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another family; the message says which."""


def save_model(
    folder: str | Path,
    model: nn.Module,
    config: dict[str, Any],
    *,
    weights: str = WEIGHTS,
    half: bool = False,
) -> None:
    """Writes a model.

    Args:
        folder: Made if missing.
        model: The network.
        config: JSON values for `config.json`.
        weights: Name of the safetensors file.
        half: Store matrices in bfloat16, half the size.

    Raises:
        FloatingPointError: A weight is NaN or infinite; nothing is written.
        OSError: A file cannot be written.
    """
    check_weights(model, folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.to(torch.bfloat16) if half and t.ndim > 1 else t).detach().cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    save_tensors(folder / weights, tensors)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def check_weights(model: nn.Module, folder: str | Path) -> None:
    """Keeps weights that could not be read again from being written.

    Raises:
        FloatingPointError: A weight is NaN or infinite.
    """
    broken = [name for name, t in model.state_dict().items() if not torch.isfinite(t).all()]
    if broken:
        raise FloatingPointError(
            f"weights with NaN or infinity are not written to {folder}: {_some(broken)}"
        )


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with complete(path, SafetensorError) as part:
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(0o644)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: Missing, not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found


def read_config(folder: Path, kind: Kind, family: str) -> dict[str, Any]:
    """The `config.json` of a model's folder.

    Raises:
        CheckpointError: Missing, not JSON, or of another family.
    """
    path = folder / CONFIG
    if not path.exists():
        nested = f"; did you mean {folder / kind}?" if (folder / kind).is_dir() else ""
        raise CheckpointError(f"{folder} is no {kind}: it has no {CONFIG}{nested}")
    config = read_json(path)
    if config.get("family") != family:
        names = ("family", "model_type", "_class_name")
        known = [f"{name}={config[name]!r}" for name in names if name in config]
        also = "; environments and scores also take the published layout, model_type='llama'"
        raise CheckpointError(
            f"{path} says {', '.join(known) or 'no family'}; supported is family={family!r}"
            f"{also if kind == 'world' else ''}"
        )
    return config


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a module from a safetensors file whose keys and shapes must match exactly.

    Raises:
        CheckpointError: The file is missing or damaged, keys or shapes differ, or a value is not
            finite.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        index = path.with_name(f"{path.name}.index.json")
        several = (
            f", and the several files that {index.name} lists are not read; make them one in "
            "transformers: model.save_pretrained(folder, max_shard_size='1TB')"
        )
        raise CheckpointError(f"{path} is missing{several if index.exists() else ''}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
    weights = model.state_dict()
    check_fit(weights, tensors, str(path))
    model.load_state_dict({k: v.to(weights[k].dtype) for k, v in tensors.items()})


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
        missing = sorted(expected.keys() - found.keys())
        unknown = sorted(found.keys() - expected.keys())
        other = [
            f"{k}: {found[k]} instead of {expected[k]}"
            for k in sorted(expected.keys() & found.keys())
            if expected[k] != found[k]
        ]
        raise CheckpointError(
            f"{source} does not fit its config: missing {_some(missing)}, unknown "
            f"{_some(unknown)}, shapes {_some(other)}"
        )
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise CheckpointError(f"{source} has NaN or infinity in {_some(broken)}")


def _some(names: list[str], most: int = 10) -> str:
    """A list in words, cut where it gets long."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"


def digest_of(files: Iterable[Path]) -> str:
    """What changes when the contents of files do."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def reason_of(error: Exception) -> str:
    """First line of why a file could not be read, without PyTorch's advice to trust it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, or is no file of PyTorch's"
    words = repr(error) if isinstance(error, KeyError) else f"{error}"
    return words.partition("\n")[0] or type(error).__name__


def shipped(kind: Kind) -> list[str]:
    """Names of the models that ship with wmgym."""
    return sorted(p.parent.name for p in asset_path().glob(f"{_SHIPPED[kind]}/*/{CONFIG}"))


def model_folder(kind: Kind, given: str | Path) -> Path:
    """Folder of a model given by name or path; a shipped name goes before a folder of that name.

    Raises:
        CheckpointError: Neither a shipped model nor a folder.
    """
    names = shipped(kind)
    if str(given) in names:
        return asset_path(_SHIPPED[kind], str(given))
    if Path(given).is_dir():
        return Path(given)
    raise CheckpointError(
        f"{kind}={str(given)!r} is neither a folder nor one of the shipped {_SHIPPED[kind]} {names}"
    )
