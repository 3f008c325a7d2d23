"""Twelve episodes on a stand-in of LIBERO, as a program: `evaluate_tiny.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from wmgym_agents.evaluate import EvaluationConfig, evaluate

if __name__ == "__main__":
    evaluate(
        EvaluationConfig(
            policy="stand_in:policy",
            out=Path(sys.argv[1]),
            tasks=(0, 1, 2),
            init_states=(40, 41, 42, 44),
            workers=2,
            videos=1,
        ),
        progress=False,
    )
