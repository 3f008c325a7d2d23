"""Weights, gradients and optimizer state spread over the processes of a run (FSDP2).

A checkpoint holds everything whole, as the main process gathers it, so that it goes on with any
number of processes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from wmgym.distributed import Processes
from wmgym.run import ModelT, Run, write_state

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, layers: nn.ModuleList, here: Processes) -> None:
    """Spreads a model over the processes, layer by layer, in place.

    Args:
        model: Equal in all processes.
        layers: Those of its parts that are gathered one after the other.
        here: The processes of the run.

    Raises:
        ValueError: There is one process only.
    """
    if here.size == 1:
        raise ValueError("sharding='fsdp' needs several processes: torchrun --nproc-per-node 2 ...")
    mesh = init_device_mesh(here.device.type, (here.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Gives gathered weights up again.

    After a pass without gradient the outermost ones stay gathered, and the next pass with gradient
    would lose theirs.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(model: ModelT, empty: ModelT) -> ModelT:
    """The whole model in the main process; all processes call this.

    Args:
        model: A sharded one.
        empty: One of the same shape, on the device "meta".
    """
    weights = get_model_state_dict(model, options=_WHOLE)
    if weights:
        empty.load_state_dict(weights, assign=True)
    return empty


class ShardedRun(Run[ModelT]):
    """A run whose weights are sharded, without average; all processes call its methods together."""

    spread = True

    def save(self, path: Path) -> None:
        """As `Run.save`; the main process writes."""
        state = self.state()
        if dist.get_rank() == 0:
            write_state(path, state)
        dist.barrier()

    def state(self) -> dict[str, Any]:
        """As `Run.state`, whole in the main process, without tensors in the others."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_WHOLE)
        return {
            "model": model,
            "average": None,
            "optimizer": optimizer,
            "step": self.step,
            "settings": json.dumps(self.settings),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """As `Run.restore`."""
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=copy.copy(state["optimizer"]),
            options=options,
        )
        self.step = state["step"]


def empty_like(model: Any) -> Any:
    """A model of the same shape, without memory."""
    with torch.device("meta"):
        return type(model)(model.config)
