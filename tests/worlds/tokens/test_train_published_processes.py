"""Published networks trained by programs: killed and gone on, by one process and by two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import programs
import pytest
import torch
from published_train_tiny import (
    STEPS,
    dynamics_training,
    random_tokenizer,
    tokenizer_training,
)
from safetensors.torch import load_file

from wmgym.worlds.tokens.train_dynamics import train_dynamics
from wmgym.worlds.tokens.train_tokenizer import train_tokenizer

PROGRAM = Path(__file__).with_name("published_train_tiny.py")
FOLDERS = {"PYTHONPATH": f"{programs.ENVIRONMENT['PYTHONPATH']}:{PROGRAM.parent}"}


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setattr(programs, "ENVIRONMENT", programs.ENVIRONMENT | FOLDERS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset):
    """One process's tokenizer and dynamics."""
    out = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_tokenizer(tokenizer_training(tiny_dataset, out / "tokenizer"), progress=False)
        random = random_tokenizer(out / "random")
        train_dynamics(dynamics_training(tiny_dataset, out / "dynamics", random), progress=False)
    finally:
        torch.set_num_threads(threads)
    return out


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if entry["group"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == STEPS
    return checkpoint["model"]


def test_a_killed_run_goes_on_to_the_same_bits(finished, tiny_dataset, tmp_path):
    command = [sys.executable, PROGRAM, "tokenizer", tiny_dataset, tmp_path]
    programs.kill_when([*command, "0.5"], (tmp_path / "checkpoint.pt").exists)
    programs.run(command)
    (one,) = tmp_path.glob("**/diffusion_pytorch_model.safetensors")
    (other,) = (finished / "tokenizer").glob("**/diffusion_pytorch_model.safetensors")
    assert load_file(one).keys() == load_file(other).keys()
    for name, tensor in load_file(one).items():
        assert torch.equal(tensor, load_file(other)[name]), name
    assert losses(tmp_path) == losses(finished / "tokenizer")


def alike(out: Path, finished: Path) -> None:
    """Losses and weights up to the order of sums."""
    expected = losses(finished)
    assert len(expected) == STEPS
    assert losses(out) == pytest.approx(expected, rel=2e-4)
    other = weights(finished)
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("what", ["tokenizer", "dynamics"])
def test_two_processes_have_the_losses_of_one(what, finished, tiny_dataset, tmp_path):
    programs.run([*programs.TORCHRUN, PROGRAM, what, tiny_dataset, tmp_path])
    alike(tmp_path, finished / what)


def test_sharded_weights_are_the_same_and_go_on(finished, tiny_dataset, tmp_path):
    command = [*programs.TORCHRUN, PROGRAM, "sharded", tiny_dataset, tmp_path]
    programs.run([*command, 5])
    programs.run(command)
    alike(tmp_path, finished / "dynamics")
