"""Reports: JSON files beside what they describe.

Every report names the command that made it, the seed, the machine and the version, so that whoever
doubts a figure can ask for it again.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import wmgym


def machine() -> str:
    """The machine in one line: processor, cores, memory, accelerator, Python and PyTorch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        _processor(),
        f"{os.cpu_count()} cores",
        f"{memory:.0f} GiB",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_report(path: str | Path, figures: dict[str, Any], *, command: str, seed: int) -> None:
    """Writes figures with where they come from; the file appears complete or not at all.

    Args:
        path: The JSON file; its folder is made if missing.
        figures: JSON values.
        command: The line that makes this report.
        seed: The seed it was made with.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {
        "command": command,
        "seed": seed,
        "machine": machine(),
        "version": wmgym.__version__,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**figures, **origin}, indent=2) + "\n")
    part.replace(path)
