"""Where time and memory go: seconds by phase, and the most memory that a block takes."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_GIB = 2**30


class Timer:
    """Seconds by phase; work that a GPU still has to do counts where it was given.

    Args:
        device: Where the work is done.

    Attributes:
        seconds: Since the last `read`, by name of the phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of a block to a phase; phases may be nested."""
        self._settle()
        began = time.perf_counter()
        yield
        self._settle()
        self.seconds[phase] += time.perf_counter() - began

    @contextmanager
    def method(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """Adds the time of every call of a method of one object, within a block, to a phase."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)

    def read(self) -> dict[str, float]:
        """The seconds so far, by name of the phase and `_s`; they start at 0 again."""
        seconds = {f"{phase}_s": value for phase, value in self.seconds.items()}
        self.seconds.clear()
        return seconds

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Most memory in GiB that a block takes beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / _GIB
        return
    before, most, over = _resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], _resident() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0] / _GIB
    finally:
        over.set()
        thread.join()


def _resident() -> int:
    """Bytes of this process in memory; nothing where the system does not tell."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
