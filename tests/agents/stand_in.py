"""As `reaching`, in a process, worker or parent, whose LIBERO is a stand-in."""

from __future__ import annotations

from reaching import policy
from toy_libero import ToyLibero
from wmgym_agents import evaluate

ToyLibero.pace = 0.05
evaluate.LiberoEnv = ToyLibero

__all__ = ["policy"]
