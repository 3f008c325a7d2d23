"""World models: what the environment asks of one, and the two families behind it.

The small family (`latent_world`) ships; the published one (`wmgym.worlds.tokens`) loads the
released checkpoints. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmgym.worlds.checkpoints import load_world
    from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
    from wmgym.worlds.tokens.load import load_token_world
    from wmgym.worlds.tokens.transformer import TokenDynamics, TokenDynamicsConfig

_HOMES = {
    "CompressiveTokenizer": "tokens.compressive",
    "CompressiveTokenizerConfig": "tokens.compressive",
    "TokenDynamics": "tokens.transformer",
    "TokenDynamicsConfig": "tokens.transformer",
    "load_token_world": "tokens.load",
    "load_world": "checkpoints",
}

__all__ = [
    "CompressiveTokenizer",
    "CompressiveTokenizerConfig",
    "TokenDynamics",
    "TokenDynamicsConfig",
    "load_token_world",
    "load_world",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
