"""Two very short takes in LIBERO as a program: `record_short.py OUT`.

Worker processes import this file too, and with it the shorter episodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from wmgym.experts import recorder

recorder.STEP_LIMITS = {**recorder.STEP_LIMITS, "libero_object": 12}

if __name__ == "__main__":
    config = recorder.RecordConfig(
        suite="libero_object",
        out=Path(sys.argv[1]),
        tasks=(0,),
        episodes=1,
        held_out=1,
        misses=0,
        attempts=1,
        image_size=64,
        workers=1,
    )
    recorder.record(config, progress=False)
