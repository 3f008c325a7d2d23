"""The convention in which a world was trained is found; where there is none, that is said."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from published_train_tiny import DYNAMICS, dynamics_training, random_tokenizer

from wmgym import cli
from wmgym.data import convert_dataset
from wmgym.data.lerobot_writer import assemble, stage_episode
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.diagnose import DiagnosisConfig, _others, diagnose, summary, verdict
from wmgym.worlds.tokens.train_dynamics import train_dynamics
from wmgym.worlds.tokens.transformer import TokenDynamics

LEVELS = np.array([-0.6, -0.2, 0.2, 0.6])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Frames of one colour, which the first dimension of the action before them decides."""
    folder = tmp_path_factory.mktemp("colours")
    names = [f"episode-{i}" for i in range(len(tiny.INIT_STATES))]
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        told = rng.integers(len(LEVELS), size=20)
        plain = tiny.episode(number, length=20)
        actions = np.tile(LEVELS[told].astype(np.float32)[:, None], (1, 7))
        actions[:, 1:] = rng.choice(LEVELS, (20, 6))
        grey = np.concatenate([[128], 30 + 60 * told[:-1]]).astype(np.uint8)
        images = np.broadcast_to(grey[:, None, None, None], plain.images.shape).copy()
        changed = dataclasses.replace(plain, actions=actions, images=images, wrist_images=None)
        stage_episode(folder / "staging", name, changed)
    return assemble(folder / "staging", folder / "colours", names)


def trained(data: Path, out: Path, convention: str) -> Path:
    config = dynamics_training(
        data,
        out,
        random_tokenizer(out / "random"),
        action_space=convention,
        ranges="published",
        steps=90,
        batch_size=8,
        micro_batch=8,
        learning_rate=1e-2,
        warmup=10,
        augment=False,
        validate_every=90,
        save_every=90,
    )
    return train_dynamics(config, progress=False)


def ask(world: Path, data: Path, **changes) -> dict:
    values = {"frames": 3, "windows": 40, "batch_size": 16, "device": "cpu", **changes}
    return diagnose(DiagnosisConfig(world=str(world), data=data, **values), progress=False)


@pytest.mark.parametrize("convention", ["raw", "normalised"])
def test_the_convention_of_the_training_is_found(convention, data, tmp_path):
    world = trained(data, tmp_path, convention)
    found = ask(world, data)
    assert found["fits"] == found["stored"] == convention
    own = found["losses"][convention]
    assert own["gain"]["low"] > 0
    assert own["gain"]["mean"] == pytest.approx(own["shuffled"] - own["own"], abs=1e-6)
    assert found["windows"] == 40
    assert f"trained with {convention} actions" in summary(found)
    # A checkpoint that says nothing is taken for raw; the dataset gives the percentiles.
    ActionTokens(ActionTokens.load(world).ranges).save(world)
    again = ask(world, data)
    assert again["fits"] == convention
    assert again["quantiles_from"] == "data"
    wrong = convention != "raw"
    assert ("its actions.json says raw: set action_space" in summary(again)) == wrong
    pairs = tuple((low, high) for low, high in again["quantiles"])
    mended = ActionTokens(ActionTokens.load(world).ranges, again["fits"], pairs if wrong else None)
    mended.save(world)
    assert ask(world, data)["fits"] == ask(world, data)["stored"] == convention
    assert ask(world, data)["losses"] == again["losses"]
    assert ask(world, data, seed=1)["losses"] != again["losses"]


def test_a_world_that_does_not_listen_fits_neither(data, tmp_path, monkeypatch, capsys):
    world = tmp_path / "world"
    random_tokenizer(world / "tokenizer")
    TokenDynamics(DYNAMICS).save_pretrained(world)
    model = TokenDynamics.from_pretrained(world)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(world)
    out = tmp_path / "report.json"
    line = ["wmgym", "diagnose", "--world", world, "--data", data, "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, line), "--frames", "2", "--windows", "6"])
    cli.main()
    report = json.loads(out.read_text())
    assert report["fits"] == "neither"
    assert report["command"].startswith("wmgym diagnose --world")
    assert report["seed"] == 0
    assert "neither convention is better" in capsys.readouterr().out


def test_rlds_is_read_like_lerobot(data, tmp_path):
    world = tmp_path / "world"
    random_tokenizer(world / "tokenizer")
    TokenDynamics(DYNAMICS).save_pretrained(world)
    rlds = convert_dataset(data, tmp_path / "colours", progress=False)
    losses = [ask(world, folder, windows=4)["losses"]["raw"]["own"] for folder in (data, rlds)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_the_verdict_is_that_of_the_intervals():
    help_, none = {"low": 0.1, "high": 0.2}, {"low": -0.1, "high": 0.1}
    less, more = {"low": -0.3, "high": -0.1}, {"low": 0.1, "high": 0.3}
    both = {"raw": help_, "normalised": help_}
    assert verdict(both, less) == "raw"
    assert verdict(both, more) == "normalised"
    assert verdict(both, none) == "undecided"
    assert verdict({"raw": help_, "normalised": none}, none) == "raw"
    assert verdict({"raw": none, "normalised": help_}, none) == "normalised"
    assert verdict({"raw": none, "normalised": none}, less) == "neither"


def test_every_window_is_told_the_actions_of_another_one():
    for count in (2, 3, 50):
        other = _others(count, np.random.default_rng(count)).tolist()
        assert sorted(other) == list(range(count))
        assert all(i != j for i, j in enumerate(other))


def test_windows_that_cannot_be_are_refused(data, tmp_path):
    for changes in ({"windows": 1}, {"frames": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be >= 2, >= 2 and >= 1"):
            DiagnosisConfig(world="x", data=data, **changes)
    world = tmp_path / "world"
    random_tokenizer(world / "tokenizer")
    TokenDynamics(DYNAMICS).save_pretrained(world)
    with pytest.raises(ValueError, match="0 windows of 31 frames"):
        ask(world, data, frames=31)
