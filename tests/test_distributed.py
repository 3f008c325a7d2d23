"""A process alone; several are in `tests/worlds/test_train_processes.py`."""

from __future__ import annotations

import pytest
import torch

from wmgym.distributed import Processes, processes


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_process_without_torchrun_is_the_main_one(device, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with processes(device) as here:
        assert (here.rank, here.size, here.main) == (0, 1, True)
        value = torch.tensor(3.0, device=here.device)
        assert here.mean(value) is value
        here.wait()
        assert here.device.type == (
            "cuda" if torch.cuda.is_available() and device == "auto" else "cpu"
        )


@pytest.mark.parametrize("device", ["tpu", "cuda:9", ""])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="allowed here are"), processes(device):
        pass


def test_a_tensor_that_is_elsewhere_is_refused():
    here = Processes(0, 1, torch.device("meta"))
    with pytest.raises(ValueError, match="a tensor on cpu cannot be averaged between processes on"):
        here.mean(torch.zeros(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"device='cuda': allowed here are \['auto', 'cpu'\]"):
        processes("cuda").__enter__()
