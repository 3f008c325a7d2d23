"""Training as real processes: killed without warning, and several at once under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_tiny import STEPS, config

from wmgym.worlds.checkpoints import load_model
from wmgym.worlds.train import train

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "train_tiny.py"
PATH = os.pathsep.join(map(str, [HERE.parents[1], HERE.parent, HERE]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}


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
    with subprocess.Popen([*command, "0.5"], env=ENVIRONMENT) as process:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "checkpoint.pt").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < steps_done(tmp_path) < STEPS
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    assert steps_done(tmp_path) == STEPS
    worlds = [load_model(out / "world").state_dict() for out in (tmp_path, finished)]
    for name, weight in worlds[0].items():
        assert torch.equal(weight, worlds[1][name]), name
    assert last_scores(tmp_path) == last_scores(finished)


def test_two_processes_train_the_same_world(finished, tiny_dataset, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(PROGRAM), str(tiny_dataset), str(tmp_path)]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
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
