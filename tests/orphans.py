"""Two workers that wait, as a program that is killed: `orphans.py FOLDER`."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

from wmgym.workers import in_workers


def wait(number: int, folder: Path) -> None:
    (folder / f"{number}.part").write_text(str(os.getpid()))
    (folder / f"{number}.part").replace(folder / f"{number}.pid")
    time.sleep(600)


if __name__ == "__main__":
    list(in_workers(functools.partial(wait, folder=Path(sys.argv[1])), range(2), 2))
