"""GRPO as real processes: killed without warning, and several at once under torchrun."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import small
import torch
from programs import TORCHRUN, kill_when, run
from rft_tiny import STARTS, STEPS, config, toy
from toy import SIZE
from wmgym_agents.encoder import EncoderConfig
from wmgym_agents.grpo import grpo
from wmgym_agents.policy import FlowVLA

PROGRAM = Path(__file__).with_name("rft_tiny.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    eyes = EncoderConfig(image_size=SIZE[0], widths=(8, 16), blocks=(1, 1), buckets=64)
    folder = tmp_path_factory.mktemp("policies") / "base"
    small.policy(dataclasses.replace(small.CONFIG, encoder=eyes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """An uninterrupted run on one thread, as the programs do."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        grpo(config(base, out, starts=STARTS), progress=False, **toy())
    finally:
        torch.set_num_threads(threads)
    return out


def rewards(out: Path) -> list[float]:
    """Of every step, and of the starts that are watched."""
    return [json.loads(line)["reward"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return FlowVLA.from_pretrained(out / "policy").state_dict()


def test_a_killed_run_goes_on_to_the_same_bits(base, finished, tmp_path):
    command = [sys.executable, str(PROGRAM), str(base), str(tmp_path)]
    kill_when([*command, "0.5"], (tmp_path / "checkpoint.pt").exists)
    assert 0 < torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < STEPS
    run(command)
    for name, weight in weights(tmp_path).items():
        assert torch.equal(weight, weights(finished)[name]), name
    assert rewards(tmp_path) == rewards(finished)


def test_two_processes_train_the_same_policy(base, finished, tmp_path):
    command = [*TORCHRUN, str(PROGRAM), str(base), str(tmp_path)]
    run(command)
    trained = weights(tmp_path)
    for name, weight in weights(finished).items():
        off = (trained[name] - weight).abs().mean()
        assert off < 3e-5, (name, off)  # a step moves a weight by 1e-3
    assert rewards(tmp_path) == pytest.approx(rewards(finished), rel=1e-3)
