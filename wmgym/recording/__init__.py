"""Imagined rollouts as videos and picture strips.

Names are imported when they are first used, so that writing a video loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmgym.recording.panels import StepFrames, StepPicture
    from wmgym.recording.rollouts import (
        RolloutRecord,
        noisy_reference_policy,
        record_rollout,
        reference_policy,
    )
    from wmgym.recording.strip import compose_strip
    from wmgym.recording.video import VideoWriter, save_picture

_HOMES = {
    "RolloutRecord": "rollouts",
    "StepFrames": "panels",
    "StepPicture": "panels",
    "VideoWriter": "video",
    "compose_strip": "strip",
    "noisy_reference_policy": "rollouts",
    "record_rollout": "rollouts",
    "reference_policy": "rollouts",
    "save_picture": "video",
}

__all__ = [
    "RolloutRecord",
    "StepFrames",
    "StepPicture",
    "VideoWriter",
    "compose_strip",
    "noisy_reference_policy",
    "record_rollout",
    "reference_policy",
    "save_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
