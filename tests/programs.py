"""Programs of the tests: where they find modules, how they are killed, how many run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FOLDERS = [TESTS.parent, TESTS.parent / "agents", TESTS, TESTS / "agents", TESTS / "worlds"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
    "OMP_NUM_THREADS": "1",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(command: Sequence[object]) -> None:
    """Runs a program to its end, which must be a good one."""
    words = list(map(str, command))
    subprocess.run(words, env=ENVIRONMENT, check=True, timeout=300, capture_output=True)


def kill_when(command: Sequence[object], ready: Callable[[], bool], *, alone: bool = False) -> None:
    """Starts a program and kills it without warning once it has come so far.

    Its workers are killed with it, or must notice by themselves that they are `alone`.
    """
    words = list(map(str, command))
    with subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 300
            while not ready():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
