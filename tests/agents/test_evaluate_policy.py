"""Evaluation in LIBERO: paired episodes, resumption, failures on film, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import reaching
import small
from programs import ENVIRONMENT, kill_when, run
from toy_libero import BROKEN, ToyLibero
from wmgym_agents import evaluate as module
from wmgym_agents.acting import digest, load_policy
from wmgym_agents.evaluate import EvaluationConfig, episodes, evaluate, report, summary
from wmgym_agents.outcomes import EPISODES, Episode, line, read, resume
from wmgym_agents.policy import FlowVLA

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
    film = iio.imread(settings.out / "videos" / names[1]).astype(int)
    assert film.shape[0] == 25
    assert np.abs(film[0, -384:] - film[24, -384:]).mean() > 0.5
    assert film[0, :-384].min() < 100  # the instruction
    assert np.abs(film[0, :-384] - film[24, :-384]).mean() < 1


def test_report_and_page(played):
    settings, outcomes = played
    report(settings, outcomes, "wmgym evaluate ...")
    told = json.loads((settings.out / "report.json").read_text())
    assert told["settings"]["jitter"]["interval"] == [0.0, 0.6576]
    assert told["command"] == "wmgym evaluate ..."
    shown = (settings.out / "index.html").read_text()
    assert shown.count("pick up the alphabet soup") == 2 + 2  # tables and captions
    assert 'src="videos/jitter-task0-state40-0.mp4"' in shown
    assert "(jitter, task 0, initial state 40, copy 0)" in shown
    assert "<dt>image size, pixels</dt><dd>32</dd>" in shown
    one = dataclasses.replace(settings, settings=("standard",))
    report(one, evaluate(one, progress=False), "wmgym evaluate ...")
    assert "jitter" not in (settings.out / "index.html").read_text()


def test_a_killed_evaluation_goes_on_to_the_same_outcomes(tmp_path):
    program = [sys.executable, Path(__file__).with_name("evaluate_tiny.py")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([*program, whole])
    written = parts / EPISODES
    kill_when(
        [*program, parts],
        lambda: written.exists() and len(written.read_text().splitlines()) >= 4,
    )
    done = written.read_text()
    assert len(done.splitlines()) < 13
    with written.open("a") as file:
        file.write('{"task_id": 0, "setting": "sta')
    run([*program, parts])
    assert written.read_text().startswith(done)
    outcomes = [
        {episode: (o["success"], o["steps"]) for episode, o in read(folder)[1].items()}
        for folder in (whole, parts)
    ]
    assert outcomes[0] == outcomes[1]
    assert {success for success, _ in outcomes[0].values()} == {True, False}
    films = [{p.name: p.read_bytes() for p in out.glob("videos/*")} for out in (whole, parts)]
    assert films[0] == films[1]
    assert len(films[0]) == 1


# --- with a stand-in of the simulator, in this process ------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """LIBERO's stand-in; the number of episodes that were started."""
    started = []

    def run_here(function, jobs, workers, group):
        for job in jobs:
            started.append(job)
            yield function(job)

    monkeypatch.setattr(module, "LiberoEnv", ToyLibero)
    monkeypatch.setattr(module, "in_workers", run_here)
    caches = (module._policy, module._environment, module._simulation)
    for cache in caches:
        cache.cache_clear()
    yield started
    for cache in caches:
        cache.cache_clear()


def test_an_episode_that_breaks_off_is_a_failure_and_counted_apart(toy, tmp_path):
    states = (40, 41, 42, BROKEN, 44, 45)
    settings = config(tmp_path, init_states=states, settings=("standard", "jitter"))
    outcomes = evaluate(settings, progress=False)
    broken = outcomes[Episode(0, "jitter", BROKEN, 0)]
    assert broken["error"] == "RuntimeError: no sound scene"
    assert (broken["success"], broken["steps"]) == (False, 0)
    figures = report(settings, outcomes, "")["settings"]
    assert figures["standard"]["errors"] == 0
    assert figures["jitter"]["errors"] == 1
    assert figures["jitter"]["episodes"] == 6
    assert "1 of the failures" in (tmp_path / "index.html").read_text()
    assert evaluate(settings, progress=False) == outcomes
    assert len(toy) == len(outcomes)


def test_an_error_of_the_policy_ends_the_evaluation_with_its_cause(toy, tmp_path):
    with pytest.raises(RuntimeError, match="the policy failed in Episode") as failure:
        evaluate(config(tmp_path, policy="reaching:stumbling"), progress=False)
    assert isinstance(failure.value.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"shape \(7,\) in Episode.*, expected \(1, T, 7\)"):
        evaluate(config(tmp_path / "shape", policy="reaching:wrong"), progress=False)
    with pytest.raises(ValueError, match=r"NaN or infinity in Episode\(task_id=0"):
        evaluate(config(tmp_path / "nan", policy="reaching:dizzy"), progress=False)
    with pytest.raises(ValueError, match=r"returned a list in Episode.*expected numbers"):
        evaluate(config(tmp_path / "words", policy="reaching:talking"), progress=False)


def test_a_policy_may_return_tensors_that_know_their_gradient(toy, tmp_path):
    settings = [
        config(tmp_path / name, policy=f"reaching:{name}") for name in ("learner", "policy")
    ]
    learner, plain = (evaluate(one, progress=False) for one in settings)
    assert [o["success"] for o in learner.values()] == [o["success"] for o in plain.values()]


def test_an_evaluation_of_other_physics_is_another_one(toy, tmp_path, monkeypatch):
    settings = config(tmp_path)
    evaluate(settings, progress=False)
    assert "mujoco 3." in settings.header["physics"]
    monkeypatch.setattr(module, "version", lambda name: "99")
    with pytest.raises(ValueError, match=r"physics 'mujoco 3\..* and 'mujoco 99"):
        evaluate(settings, progress=False)


def test_episodes_of_an_earlier_run_are_told(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    evaluate(config(tmp_path), progress=False)
    assert caplog.messages == []
    evaluate(config(tmp_path, init_states=(40, 41, 42)), progress=False)
    [said] = caplog.messages
    assert said.startswith("2 episodes taken from an earlier run")
    assert said.endswith("delete that folder if the policy has changed")


def test_the_time_of_an_episode_is_not_that_of_making_a_simulator(toy, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ToyLibero, "reset", slow_first(ToyLibero.reset, made))
    outcomes = evaluate(config(tmp_path, tasks=(0, 1)), progress=False)
    assert len(made) == 2
    assert all(o["seconds"] < 0.3 for o in outcomes.values())


def slow_first(reset, made):
    """As making the simulator of a task, when it is asked for first."""

    def slow(self, *, seed, options):
        if options["task_id"] not in made:
            made.append(options["task_id"])
            time.sleep(0.4)
        return reset(self, seed=seed, options=options)

    return slow


def test_a_film_that_shows_no_failure_says_so(toy, tmp_path, caplog):
    settings = config(tmp_path, policy="reaching:fickle", init_states=(40,), videos=1)
    evaluate(settings, progress=False)
    assert "when it was repeated for its film: solved" in caplog.text


# --- who may act, and what is refused -----------------------------------------------------------


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


def test_other_weights_of_the_same_name_are_another_policy(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "policy"
    small.policy(seed=0).save_pretrained(folder)
    settings = config(tmp_path / "out", policy=str(folder), init_states=(40,))
    resume_here = dataclasses.replace(settings, image_size=32).header
    settings.out.mkdir()
    assert resume(settings.out, resume_here) == {}
    outcome = {"success": True, "steps": 3, "seconds": 1.0}
    with (settings.out / EPISODES).open("a") as file:
        file.write(line(Episode(0, "standard", 40, 0), outcome))
    assert list(evaluate(settings, progress=False).values()) == [outcome]
    assert caplog.messages == [f"1 episodes taken from an earlier run in {settings.out}"]
    before = digest(str(folder))
    small.policy(seed=1).save_pretrained(folder)
    assert digest(str(folder)) != before
    with pytest.raises(ValueError, match=r"weights .* Choose another --out, or delete"):
        evaluate(settings, progress=False)
    assert digest("reaching:policy") is None


def test_what_a_function_makes_may_be_a_flow_policy():
    made = load_policy("reaching:flow", temperature=0.0, device="cpu")
    assert isinstance(made, FlowVLA)
    assert (made.image_size, made.temperature) == (32, 0.0)
    with pytest.raises(ValueError, match="device='tpu'"):
        load_policy("reaching:flow", device="tpu")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("nothing", "neither a folder nor"),
        ("reaching:nobody", "has no attribute 'nobody'"),
        ("nowhere:policy", "No module named 'nowhere'"),
        ("reaching:nothing", "makes a NoneType without reset and act: return a FlowVLA"),
        ("reaching:only_acts", "makes a SimpleNamespace without act:"),
    ],
)
def test_a_policy_must_be_one_before_anything_starts(policy, reason, toy, tmp_path):
    with pytest.raises(ValueError, match=reason):
        evaluate(config(tmp_path, policy=policy), progress=False)
    assert toy == []


def test_an_error_in_a_user_s_function_keeps_its_cause():
    with pytest.raises(RuntimeError, match=r"broken\(\) failed") as failure:
        load_policy("reaching:broken")
    assert isinstance(failure.value.__cause__, KeyError)


def test_modules_of_the_working_directory_are_found_by_the_installed_command(tmp_path):
    """Its path begins with the folder of the command, not with the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "my_policy.py").write_text("def make():\n    return 'mine'\n")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "wmgym"
    command.write_text("from wmgym.cli import main\nmain()\n")
    line = [sys.executable, command, "evaluate", "--policy", "my_policy:make", "--out", "out"]
    told = subprocess.run(
        line, cwd=tmp_path / "work", env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert "policy='my_policy:make' makes a str without reset and act" in told.stderr


def test_pictures_have_the_size_that_the_policy_says(toy, tmp_path):
    small.policy().save_pretrained(tmp_path / "policy")
    settings = config(tmp_path / "out", policy=str(tmp_path / "policy"), image_size=None)
    assert module._checked(settings).image_size == 32
    foreign = dataclasses.replace(settings, policy="reaching:policy")
    assert module._checked(foreign).image_size == 128
    assert module._checked(dataclasses.replace(foreign, image_size=256)).image_size == 256
    with pytest.raises(ValueError, match="sees pictures of 32 pixels; leave"):
        evaluate(dataclasses.replace(settings, image_size=64), progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": (99,)}, r"libero_object has tasks 0\.\.\.9"),
        ({"tasks": ()}, "at least one"),
        ({"init_states": (40, 40)}, "none twice"),
        ({"settings": ("standard", "standard")}, "none twice"),
        ({"settings": "standard"}, "settings='standard': must be a tuple"),
        ({"max_steps": 2.5}, "max_steps=2.5: must be a Python int"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"image_size": 0}, "image_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"init_states": (40, 50)}, r"stores initial states 0\.\.\.49"),
        ({"settings": ("tilted",)}, "allowed are"),
        ({"videos": -2}, "must be >= 0"),
        ({"temperature": -1.0}, "must be >= 0"),
        ({"suite": "libero_kitchen"}, "known are"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(changes, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "in_workers", lambda *_: pytest.fail("started workers"))
    with pytest.raises(ValueError, match=reason):
        evaluate(config(tmp_path, **changes), progress=False)


@pytest.mark.parametrize(
    "damage", ['{"task_id": 0, "setting"\n', "[1, 2]\n", '{"task_id": 0, "success": true}\n']
)
def test_a_damaged_line_is_named(damage, toy, tmp_path):
    evaluate(config(tmp_path), progress=False)
    with (tmp_path / EPISODES).open("a") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=r"episodes\.jsonl, line 4 is damaged: .* Remove"):
        evaluate(config(tmp_path), progress=False)


def test_episodes_are_the_same_for_every_policy_and_differ_among_themselves(tmp_path):
    first = config(tmp_path, settings=("standard", "jitter"), copies=3, tasks=(0, 1))
    second = dataclasses.replace(first, policy="other", init_states=(41,))
    assert set(episodes(second)) < set(episodes(first))
    seeds = [episode.seed(7) for episode in episodes(first)]
    assert len(set(seeds)) == len(seeds) == 2 * (2 + 2 * 3)
    assert len({Episode(0, name, 40, 0).seed(7) for name in PERTURBATIONS}) == len(PERTURBATIONS)
    assert Episode(3, "jitter", 44, 1).seed(7) == 233520750  # comparable with earlier ones
    assert reaching.policy().act(small.observation(1)).shape == (1, 8, 7)
