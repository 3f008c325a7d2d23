"""Supervised fine-tuning: it learns, it resumes, and it keeps away from what is held out."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import tiny
import torch
from programs import TORCHRUN, run
from wmgym_agents.policy import FlowVLA, PolicyConfig
from wmgym_agents.sft import SFTConfig, sft, usable

from wmgym.checkpoints import CheckpointError
from wmgym.data import FrameCache
from wmgym.data.episodes import EpisodeInfo
from wmgym.data.lerobot_writer import assemble, stage_episode


def config(data, out, **changes):
    values = {
        "policy": small.CONFIG,
        "steps": 6,
        "batch_size": 4,
        "draws": 2,
        "learning_rate": 2e-3,
        "warmup": 2,
        "validation_windows": 8,
        "validate_every": 3,
        "save_every": 2,
        "device": "cpu",
        "bfloat16": False,
    }
    return SFTConfig(data=(data,), out=out, **{**values, **changes})


def log(out, group):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


def test_it_learns_what_was_meant_not_what_was_executed(tmp_path):
    names = [f"episode-{i}" for i in range(len(tiny.INIT_STATES))]
    for number, name in enumerate(names):
        recorded = tiny.episode(number)
        meant = np.zeros_like(recorded.actions)
        meant[:, :2] = np.tanh(8 * (0.5 - recorded.proprio[:, :2]))
        stage_episode(tmp_path / "s", name, dataclasses.replace(recorded, clean_actions=meant))
    data = assemble(tmp_path / "s", tmp_path / "data", names)
    settings = config(data, tmp_path / "run", steps=200, batch_size=16, learning_rate=5e-3)
    folder = sft(dataclasses.replace(settings, ema=0.9, validate_every=10), progress=False)
    scores = log(tmp_path / "run", "validation")
    assert scores[-1]["flow_loss"] < 0.8 * scores[0]["flow_loss"]
    assert scores[-1]["action_l1"] < 0.6 * scores[0]["action_l1"]
    policy = FlowVLA.from_pretrained(folder)
    assert policy.config == small.CONFIG
    assert not policy.head.sigma_net.final_layer.linear.weight.any()


def test_a_killed_run_goes_on_to_the_same_weights(tiny_dataset, tmp_path, monkeypatch):
    module = importlib.import_module("wmgym_agents.sft")
    whole = sft(config(tiny_dataset, tmp_path / "whole"), progress=False)
    step = module._step

    def killed(run, *given):
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run, *given)

    monkeypatch.setattr(module, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        sft(config(tiny_dataset, tmp_path / "parts"), progress=False)
    monkeypatch.undo()
    parts = sft(config(tiny_dataset, tmp_path / "parts"), progress=False)
    states = [FlowVLA.from_pretrained(folder).state_dict() for folder in (whole, parts)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert [line["step"] for line in log(tmp_path / "parts", "train")] == [1, 6]

    def decoded(*given, **named):
        raise AssertionError("frames were decoded for a run that cannot go on")

    monkeypatch.setattr(module, "split_caches", decoded)
    with pytest.raises(CheckpointError, match="other settings: seed was 0, is 5"):
        sft(config(tiny_dataset, tmp_path / "parts", seed=5), progress=False)
    monkeypatch.setattr(module, "fingerprints", lambda data: ["of other data"])
    with pytest.raises(CheckpointError, match=r"data_fingerprints was .* is \['of other data'\]"):
        sft(config(tiny_dataset, tmp_path / "parts"), progress=False)
    monkeypatch.undo()
    watched = config(tiny_dataset, tmp_path / "parts", validation_windows=4, validate_every=2)
    assert sft(watched, progress=False) == parts


def test_it_goes_on_from_a_policy(tiny_dataset, tmp_path):
    start = small.policy()
    start.save_pretrained(tmp_path / "start")
    settings = config(
        tiny_dataset,
        tmp_path / "run",
        policy=PolicyConfig(),
        init_from=str(tmp_path / "start"),
        learning_rate=1e-6,
    )
    trained = FlowVLA.from_pretrained(sft(settings, progress=False))
    assert trained.statistics.num_transitions == start.statistics.num_transitions
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-4, rtol=0)


def test_failures_and_held_out_states_are_not_imitated(tiny_dataset, tmp_path):
    sft(config(tiny_dataset, tmp_path, steps=1, save_every=1), progress=False)
    seen = FrameCache.open(tmp_path / "cache" / "train").episodes
    assert {info.init_state_id for info in seen} == {0, 2}
    assert not usable(EpisodeInfo(0, 9, "task", success=False))
    assert usable(EpisodeInfo(0, 9, "task", success=None))
    with pytest.raises(ValueError, match=r"validation_states has \[45\]"):
        config(tiny_dataset, tmp_path, validation_states=(45,))


def test_initial_states_that_may_validate_are_named(tiny_dataset, tmp_path):
    settings = config(tiny_dataset, tmp_path, validation_states=(7,))
    with pytest.raises(ValueError, match=r"validation_states=\(7,\): .* chosen are \[0, 2, 25\]"):
        sft(settings, progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be > 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be > 0"),
        ({"clip": float("inf")}, "clip=inf: must be > 0 and finite"),
        ({"warmup": -1}, "warmup=-1: must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be >= 0"),
        ({"save_every": 0}, "save_every=0: must be >= 1"),
        ({"validation_windows": 0}, "validation_windows=0: must be >= 1"),
        ({"ema": 1.0}, "ema=1.0: must be < 1"),
        ({"init_from": "libero-object-small"}, r"a shape of its own: leave out policy\.\*"),
        ({"pretrained": True}, "only the backbone of vla-adapter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, tmp_path, **changes)


def test_two_processes_train_one_policy(tiny_dataset, tmp_path):
    run([*TORCHRUN, Path(__file__).with_name("sft_tiny.py"), tiny_dataset, tmp_path])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6
    sft(config(tiny_dataset, tmp_path / "alone"), progress=False)
    losses = [log(out, "train")[0]["flow_loss"] for out in (tmp_path, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # not the weights: where a gradient is nearly 0, AdamW steps by its rounding
    for step in (0, 1):
        scores = [log(out, "validation")[step] for out in (tmp_path, tmp_path / "alone")]
        assert scores[0]["flow_loss"] == pytest.approx(scores[1]["flow_loss"], rel=1e-3)
        assert scores[0]["action_l1"] == pytest.approx(scores[1]["action_l1"], rel=1e-3)


def test_tensorboard_leaves_tensorflow_alone(tmp_path):
    """TensorFlow's LLVM crashes software rendering of the simulator in the same process."""
    script = (
        "import sys; from pathlib import Path; from wmgym.distributed import processes\n"
        "from wmgym.log import Log\n"
        "out = Path(sys.argv[1])\n"
        "with processes('cpu') as here, Log(out, 0, 1, here, progress=False) as log:\n"
        "    log.write(1, 'train', {'loss': 1.0})\n"
        "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    run([sys.executable, "-c", script, tmp_path])
    assert list(tmp_path.glob("events.*"))
