"""The few things a program started by `torchrun` needs; in a single process they do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run.

    Attributes:
        rank: Its number, 0 ... size - 1.
        size: Number of processes.
        device: The device it should use.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes.

        Raises:
            ValueError: It is on another device than the process's own, where processes on GPUs
                cannot exchange it.
        """
        here = self.device
        if value.device.type != here.type or here.index not in (None, value.device.index):
            raise ValueError(
                f"a tensor on {value.device} cannot be averaged between processes on {here}: make "
                "it there, or move it with .to(device)"
            )
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes of `torchrun`, or stands alone without it.

    Args:
        device: `"auto"` (CUDA where there is some), `"cpu"` or `"cuda"`.

    Raises:
        ValueError: Another device, or CUDA where there is none.
    """
    usable = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device == "auto":
        device = usable[0]
    if device not in usable:
        raise ValueError(f"device={device!r}: allowed here are {['auto', *usable]}")
    if "RANK" not in os.environ:
        yield Processes(0, 1, torch.device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
    # The others wait while the main process decodes a dataset.
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        place = torch.device(device, local) if device == "cuda" else torch.device(device)
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
