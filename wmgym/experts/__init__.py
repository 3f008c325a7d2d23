"""Scripted experts that solve LIBERO tasks from the privileged simulator state.

They need the simulator (extra `libero`), no images and no learning.
"""

from __future__ import annotations

from wmgym.experts.arm import ExpertConfig, Phase
from wmgym.experts.planner import Expert, UnsupportedTaskError, plan

__all__ = ["Expert", "ExpertConfig", "Phase", "UnsupportedTaskError", "plan"]
