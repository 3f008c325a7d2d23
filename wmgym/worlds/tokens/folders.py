"""Folders in the published layout: `config.json` and one safetensors file, here or on a hub.

A config is a flat JSON object with more entries than anyone needs. Those that decide what a network
computes are fields of a dataclass; a value that this code does not compute is refused, never
ignored. Weights must have every key and no other.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import nn

from wmgym.checkpoints import CONFIG, CheckpointError, load_weights, read_json
from wmgym.extras import MissingExtraError, require

DescribedT = TypeVar("DescribedT", bound="Described")


class Described:
    """A config as flat JSON; for dataclasses to inherit.

    Attributes:
        kind: An entry by which configs of networks are told apart, and its value.
    """

    kind: ClassVar[tuple[str, str]]

    def require(self, **allowed: Any) -> None:
        """Checks fields that have one supported value each.

        Raises:
            ValueError: Another value; the message says which is supported.
        """
        for name, value in allowed.items():
            given = getattr(self, name)
            if given != value:
                raise ValueError(f"{name}={given!r} is not supported, {value!r} is")

    def describe(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def of(cls: type[DescribedT], described: dict[str, Any]) -> DescribedT:
        """The config in a JSON object, whose other entries are left aside.

        Raises:
            TypeError: An entry is of another type.
            ValueError: An entry is not supported.
        """
        entry, kind = cls.kind
        if described.get(entry, kind) != kind:
            raise ValueError(f"{entry}={described[entry]!r} is not supported, {kind!r} is")
        types, found = get_type_hints(cls), {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in described:
                value = described[field.name]
                if not _is_of(types[field.name], value):
                    raise TypeError(f"{field.name}={value!r}: expected {field.type}")
                found[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**found)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a JSON value can be a field of a type."""
    if kind is float:
        return type(value) in (int, float)
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_is_of(parts[0], entry) for entry in value)
    if get_origin(kind) is UnionType:
        return any(_is_of(part, value) for part in parts)
    return type(value) is (get_origin(kind) or kind)


ModelT = TypeVar("ModelT", bound=nn.Module)


def read_model(
    kind: Callable[[Any], ModelT],
    config: type[Described],
    folder: str | os.PathLike[str],
    weights: str,
) -> ModelT:
    """A frozen network in float32 on the CPU.

    Args:
        kind: Its class, which takes a config.
        config: Class of the config.
        folder: A folder, or the id of a Hugging Face repository.
        weights: Name of the safetensors file.

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit; the message says what.
    """
    path = resolve_folder(folder, (CONFIG, weights))
    shape = read_json(path / CONFIG)
    try:
        with torch.device("meta"):
            model = kind(config.of(shape))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None
    model.to_empty(device="cpu")
    load_weights(model, path / weights)
    return model.eval().requires_grad_(False)


def resolve_folder(folder: str | os.PathLike[str], files: tuple[str, ...]) -> Path:
    """A local folder, or the cached copy of a repository `owner/name`, fetched if it must be.

    Args:
        folder: Path or id.
        files: The files that are needed; nothing else is fetched.

    Raises:
        CheckpointError: Neither a folder nor a repository that can be fetched.
        MissingExtraError: A repository, without the extra `hub`.
    """
    if Path(folder).is_dir():
        return Path(folder)
    name = os.fspath(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is neither a folder nor the id of a repository, owner/name")
    try:
        hub = require("huggingface_hub", "hub")
    except MissingExtraError as error:
        raise MissingExtraError(f"there is no folder {name}; to fetch it: {error}") from None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # of the hub, of HTTP, of the network
        raise CheckpointError(f"{name} is no folder, and cannot be fetched: {error}") from error
