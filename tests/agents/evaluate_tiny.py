"""An evaluation of four short episodes as a program: `evaluate_tiny.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from wmgym_agents import evaluate as module
from wmgym_agents.evaluate import EvaluationConfig, evaluate

if __name__ == "__main__":
    module._JOB = 1
    evaluate(
        EvaluationConfig(
            policy="reaching:policy",
            out=Path(sys.argv[1]),
            tasks=(0,),
            init_states=(40, 41, 42, 43),
            workers=1,
            image_size=32,
            max_steps=24,
        ),
        progress=False,
    )
