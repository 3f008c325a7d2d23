"""Training as real processes: killed without warning, and several at once under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from programs import TORCHRUN, kill_when, run
from train_tiny import STEPS, config

from wmgym.worlds.checkpoints import load_model
from wmgym.worlds.train import train

PROGRAM = Path(__file__).with_name("train_tiny.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset) -> Path:
    """An uninterrupted run on one thread, as the programs do."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config(tiny_dataset, out), progress=False)
    finally:
        torch.set_num_threads(threads)
    return out


def steps_done(out: Path) -> int:
    return torch.load(out / "checkpoint.pt", weights_only=True)["step"]


def last_scores(out: Path) -> dict[str, float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["group"] == "validation"][-1]


def test_a_killed_run_goes_on_to_the_same_bits(finished, tiny_dataset, tmp_path):
    command = [sys.executable, str(PROGRAM), str(tiny_dataset), str(tmp_path)]
    kill_when([*command, "0.5"], (tmp_path / "checkpoint.pt").exists)
    assert 0 < steps_done(tmp_path) < STEPS
    run(command)
    assert steps_done(tmp_path) == STEPS
    worlds = [load_model(out / "world").state_dict() for out in (tmp_path, finished)]
    for name, weight in worlds[0].items():
        assert torch.equal(weight, worlds[1][name]), name
    assert last_scores(tmp_path) == last_scores(finished)


def test_two_processes_train_the_same_world(finished, tiny_dataset, tmp_path):
    command = [*TORCHRUN, str(PROGRAM), str(tiny_dataset), str(tmp_path)]
    run(command)
    runs = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (tmp_path, finished)]
    assert [run["step"] for run in runs] == [STEPS, STEPS]
    for name, weight in runs[1]["model"].items():
        off = (runs[0]["model"][name] - weight).abs().max()
        assert off < 1e-4, (name, off)
    one, two = (
        json.loads((out / "log.jsonl").read_text().split("\n")[0]) for out in (tmp_path, finished)
    )
    for name in one.keys() - {"group", "seconds"}:
        assert one[name] == pytest.approx(two[name], rel=1e-4), name
    scores = [last_scores(out) for out in (tmp_path, finished)]
    for name in ("psnr", "lpips"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-3)
