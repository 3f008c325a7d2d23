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


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: No such device here.
    """
    count = torch.cuda.device_count()
    usable = ["cuda", "cpu", *(f"cuda:{i}" for i in range(count))] if count else ["cpu"]
    if device == "auto":
        device = usable[0]
    if str(device) not in usable:
        raise ValueError(f"device={str(device)!r}: allowed here are {['auto', *usable]}")
    return torch.device(device)


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes of `torchrun`, or stands alone without it.

    Args:
        device: `"auto"` (CUDA where there is some), `"cpu"`, `"cuda"`, or one of several GPUs such
            as `"cuda:1"`; of several processes, each takes a GPU of its own in any case.

    Raises:
        ValueError: There is no such device.
    """
    place = resolve_device(device)
    if "RANK" not in os.environ:
        yield Processes(0, 1, place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # The others wait while the main process decodes a dataset.
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
