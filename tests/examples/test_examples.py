"""The examples run end to end, and what they train gets better."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image
from toy import ToyDataset, ToyWorld
from wmgym_agents.randomness import rows

FOLDER = Path(__file__).parents[2] / "examples"
TRAINERS = ("ppo_cleanrl", "ppo_sb3")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy():
    """The toy world from one start only, so that there is something to learn by heart."""
    return {
        "world": ToyWorld(),
        "dataset": ToyDataset(),
        "tasks": None,
        "starts": lambda rng, episodes: (0, 0),
        "reward_weights": {"lpips": 0.0},
    }


@pytest.mark.parametrize("name", TRAINERS)
def test_reward_rises(name, toy, capsys):
    if name == "ppo_sb3":
        pytest.importorskip("stable_baselines3")
    example = load(name)
    args = example.Args(iterations=15, num_envs=16, learning_rate=2e-3)
    history = example.main(args, **toy)
    assert len(history) == 15
    assert max(history) < 0
    assert np.mean(history[-5:]) > 0.8 * np.mean(history[:5])
    *lines, comparison = capsys.readouterr().out.splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["episodic_reward"] for line in told] == [round(r, 4) for r in history]
    assert told[-1]["steps"] == 15 * 16 * args.num_steps
    assert comparison.startswith("mean episodic R3: -0.")


@pytest.mark.parametrize("name", TRAINERS)
def test_equal_seeds_train_equally(name, toy):
    if name == "ppo_sb3":
        pytest.importorskip("stable_baselines3")
    example = load(name)
    args = example.Args(iterations=2, num_envs=4, num_steps=8, seed=3)
    history = example.main(args, **toy)
    assert example.main(args, **toy) == history
    args.seed = 4
    assert example.main(args, **toy) != history


@pytest.mark.parametrize("name", TRAINERS)
def test_trains_in_the_shipped_world(name):
    if name == "ppo_sb3":
        pytest.importorskip("stable_baselines3")
    example = load(name)
    history = example.main(example.Args(iterations=2, num_envs=2, num_steps=8))
    assert len(history) == 2
    assert np.isfinite(history).all()
    assert max(history) < 0


def test_groups(toy, capsys):
    example = load("group_rollouts")
    args = example.Args(groups=2, members=4, chunks=2)
    rewards = example.main(args, **toy)
    assert rewards.shape == (2, 2, 4)
    torch.testing.assert_close(rewards[:, :, 0], torch.zeros(2, 2), rtol=0, atol=0)
    assert (rewards[:, :, 1:] < 0).all()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "quickstart.py"))
    instruction, *steps = capsys.readouterr().out.splitlines()
    assert "basket" in instruction
    assert len(steps) == 8
    assert all(float(step.split()[0]) == 0 for step in steps)
    with Image.open("quickstart.png") as image:
        assert image.width == 2 * image.height


def test_errors_are_told_apart_by_phase(capsys, tmp_path):
    example = load("where_policies_err")
    recorded = np.zeros((3, 8, 7), np.float32)
    recorded[0, :, :3], recorded[..., 6] = 0.5, -1  # fast, slow, and the gripper closes halfway
    recorded[2, 4:, 6] = 1
    chunks = recorded + np.array([0.1, 0.2, 0.3], np.float32)[:, None, None]
    chunks[2, 5, 6] = -1
    told = example.errors(chunks, recorded)
    errors = {"fast": 0.1, "slow": 0.2, "gripper": 0.3, "late": 1 / 8}
    counts = {"fast_chunks": 1, "slow_chunks": 1, "gripper_chunks": 1}
    assert told == pytest.approx(errors | counts)

    args = example.Args(("libero-object-small",), starts=32, out=tmp_path / "errors.json")
    figures = example.main(args)["libero-object-small"]
    noisy, sure = figures["temperature 1"], figures["temperature 0"]
    assert 0 < sure["fast"] < noisy["fast"] < 1
    assert noisy["R3"] < 0 > sure["R3"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    written = json.loads((tmp_path / "errors.json").read_text())
    assert written["policies"]["libero-object-small"] == figures


def test_a_step_s_gradient_is_compared_with_that_of_the_error(capsys, tmp_path):
    example = load("what_a_step_teaches")
    out = tmp_path / "cosines.json"
    args = example.Args(rewards=("R1",), batches=2, starts=16, out=out)
    rows = example.main(args)
    assert [row["shared_start"] for row in rows] == [False, True]
    for row in rows:
        assert all(-1 < row[of]["mean"] < 1 for of in ("noise", "no_noise"))
        assert row["noise"]["error"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert json.loads(out.read_text())["cosines"] == rows


def test_denoising_with_a_gradient_is_how_a_policy_acts():
    example = load("what_a_step_teaches")
    policy = small.policy()
    seen = policy.encode(small.observation(2))
    noise = rows(torch.randn, 2, (4, 7), torch.Generator().manual_seed(0))
    chunks = example.denoised(policy, noise, seen.tokens, seen.proprio)
    acted = policy.act(seen, torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.executed(chunks), torch.as_tensor(acted), atol=1e-5, rtol=0)
