"""Evaluation in LIBERO: paired episodes, resumption, failures on film, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import reaching
import small
from programs import ENVIRONMENT, kill_when, run
from wmgym_agents.evaluate import (
    EPISODES,
    Episode,
    EvaluationConfig,
    _jobs,
    episodes,
    evaluate,
    load_policy,
    report,
    summary,
)
from wmgym_agents.policy import FlowVLA

from wmgym.checkpoints import CheckpointError
from wmgym.envs.perturbations import PERTURBATIONS

pytestmark = pytest.mark.libero


def config(out, **changes):
    values = {
        "policy": "reaching:policy",
        "tasks": (0,),
        "init_states": (40, 41),
        "workers": 1,
        "image_size": 32,
        "max_steps": 24,
    }
    return EvaluationConfig(out=out, **{**values, **changes})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Worker processes import the test's policy too."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Two settings of two initial states, with a film of a failure."""
    out = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        settings = config(out, settings=("standard", "jitter"), videos=1)
        return settings, evaluate(settings, progress=False)


def test_every_episode_is_played_once_and_told(played):
    settings, outcomes = played
    assert list(outcomes) == episodes(settings)
    assert all(o["steps"] == 24 and not o["success"] for o in outcomes.values())
    lines = (settings.out / EPISODES).read_text().splitlines()
    assert len(lines) == 1 + len(outcomes)
    figures = summary(outcomes, settings.settings)
    assert figures["standard"]["tasks"]["0"]["episodes"] == 2


def test_what_was_played_is_not_played_again(played):
    settings, outcomes = played
    before = (settings.out / EPISODES).read_text()
    assert evaluate(settings, progress=False) == outcomes
    more = dataclasses.replace(settings, init_states=(40,), settings=("standard",))
    assert evaluate(more, progress=False) == {
        e: o for e, o in outcomes.items() if e.init_state == 40 and e.setting == "standard"
    }
    assert (settings.out / EPISODES).read_text() == before
    with pytest.raises(ValueError, match="is of another evaluation"):
        evaluate(dataclasses.replace(settings, seed=8), progress=False)


def test_failures_are_filmed_step_by_step(played):
    settings, _ = played
    names = sorted(path.name for path in settings.out.glob("videos/*"))
    assert names == ["jitter-task0-state40-0.mp4", "standard-task0-state40-0.mp4"]
    film = iio.imread(settings.out / "videos" / names[1])
    assert film.shape == (25, 32, 32, 3)
    assert np.abs(film[0].astype(int) - film[24].astype(int)).mean() > 0.5


def test_report_and_page(played):
    settings, outcomes = played
    report(settings, outcomes, "wmgym evaluate ...")
    told = json.loads((settings.out / "report.json").read_text())
    assert told["settings"]["jitter"]["interval"] == [0.0, 0.6576]
    assert told["command"] == "wmgym evaluate ..."
    shown = (settings.out / "index.html").read_text()
    assert "pick up the alphabet soup" in shown
    assert 'src="videos/jitter-task0-state40-0.mp4"' in shown


def test_a_killed_evaluation_goes_on_to_the_same_outcomes(tmp_path):
    command = [sys.executable, Path(__file__).with_name("evaluate_tiny.py"), tmp_path]
    written = tmp_path / EPISODES
    kill_when(command, lambda: written.exists() and len(written.read_text().splitlines()) >= 2)
    done = written.read_text()
    with written.open("a") as file:
        file.write('{"task_id": 0, "setting": "sta')
    run(command)
    lines = written.read_text().splitlines()
    assert len(lines) == 1 + 4
    assert written.read_text().startswith(done)


def test_a_flow_policy_acts_as_its_seed_says(tmp_path):
    small.policy().save_pretrained(tmp_path / "policy")
    policy = load_policy(str(tmp_path / "policy"))
    chunks = []
    for seed in (1, 2, 1):
        policy.reset(seed)
        chunks.append(policy.act(small.observation(1)))
    np.testing.assert_array_equal(chunks[0], chunks[2])
    assert not np.array_equal(chunks[0], chunks[1])
    assert chunks[0].shape == (1, FlowVLA.from_pretrained(tmp_path / "policy").config.head.chunk, 7)


def test_episodes_are_the_same_for_every_policy_and_differ_among_themselves(tmp_path):
    first = config(tmp_path, settings=("standard", "jitter"), copies=3, tasks=(0, 1))
    second = dataclasses.replace(first, policy="other", init_states=(41,))
    assert set(episodes(second)) < set(episodes(first))
    seeds = [episode.seed(first) for episode in episodes(first)]
    assert len(set(seeds)) == len(seeds) == 2 * (2 + 2 * 3)
    jobs = _jobs(episodes(first))
    assert sorted(e for job in jobs for e in job) == sorted(episodes(first))
    assert all(len({e.task_id for e in job}) == 1 for job in jobs)


def test_a_policy_must_be_one(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        evaluate(config(tmp_path, policy="nothing"), progress=False)
    with pytest.raises(ValueError, match="cannot be made"):
        evaluate(config(tmp_path, policy="reaching:nobody"), progress=False)
    with pytest.raises(ValueError, match=r"actions of shape \(7,\), expected \(1, T, 7\)"):
        evaluate(config(tmp_path, policy="reaching:wrong"), progress=False)
    with pytest.raises(ValueError, match="allowed are"):
        config(tmp_path, settings=("tilted",))
    seeds = {Episode(0, name, 40, 0).seed(config(tmp_path)) for name in PERTURBATIONS}
    assert len(seeds) == len(PERTURBATIONS)
    assert reaching.policy().act(small.observation(1)).shape == (1, 8, 7)
