"""What learns inside `WorldModel-LIBERO-v0`: policies and the algorithms that train them.

Names are imported when they are first used. `grpo` and `sft` are the functions; the modules of the
same name are reached by `from wmgym_agents.grpo import ...`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmgym_agents.grpo import GRPOConfig, grpo
    from wmgym_agents.policy import FlowVLA, Observation, PolicyConfig
    from wmgym_agents.sft import SFTConfig, sft

_HOMES = {
    "FlowVLA": "policy",
    "GRPOConfig": "grpo",
    "Observation": "policy",
    "PolicyConfig": "policy",
    "SFTConfig": "sft",
    "grpo": "grpo",
    "sft": "sft",
}

__all__ = ["FlowVLA", "GRPOConfig", "Observation", "PolicyConfig", "SFTConfig", "grpo", "sft"]


class _Package(ModuleType):
    """Importing a submodule binds its name in the package, which here would hide a function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
