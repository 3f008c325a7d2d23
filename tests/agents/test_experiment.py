"""The experiment: arms, pairs, seeds and seconds, with training and simulation replaced."""

from __future__ import annotations

import json

import numpy as np
import pytest
from wmgym_agents import experiment as module
from wmgym_agents.evaluate import episodes
from wmgym_agents.experiment import ARMS, ExperimentConfig, experiment, table
from wmgym_agents.grpo import PRESETS
from wmgym_agents.outcomes import Outcomes
from wmgym_agents.statistics import gain, rate

RATES = {"base": 0.5, "sft": 0.6, "R3": 0.8}


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order; an arm succeeds as often as `RATES` says."""
    runs = []

    def grpo(config, **_):
        runs.append(config)
        config.out.mkdir(parents=True, exist_ok=True)
        lines = [{"step": s, "group": "rft", "seconds": 2.5 * s} for s in (1, 2)]
        lines.append({"step": 2, "group": "watch", "reward": 0.0})
        (config.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return config.out / "policy"

    def sft(config, **_):
        runs.append(config)
        config.out.mkdir(parents=True, exist_ok=True)
        seconds = (10.0, 30.0, 5.0, 8.0)  # interrupted after the second
        lines = [{"step": s, "group": "train", "seconds": t} for s, t in enumerate(seconds)]
        (config.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return config.out / "policy"

    def evaluate(config, **_):
        arm = config.out.parent.name.split("-")[0]
        rng = np.random.default_rng(len(runs))
        return Outcomes(
            {
                episode: {"success": bool(rng.random() < RATES[arm]), "seconds": 3.0}
                for episode in episodes(config)
            }
        )

    for name, fake in (("grpo", grpo), ("sft", sft), ("evaluate", evaluate)):
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr("wmgym_agents.evaluate.n_tasks", lambda suite: 10)
    return runs


def config(tmp_path, **changes):
    values = {"arms": ("sft", "R3"), "seeds": (0, 1), "steps": 7}
    return ExperimentConfig(
        base="base", data=tmp_path / "data", out=tmp_path / "out", **(values | changes)
    )


def test_every_arm_is_compared_with_the_base_on_the_same_episodes(trained, tmp_path):
    said = []
    figures = experiment(config(tmp_path), "wmgym experiment", said.append, progress=False)
    settings = figures["suites"]["libero_object"]
    assert list(settings) == ["standard", "jitter", "all"]
    assert list(settings["all"]) == ["base", "sft", "R3"]
    base, arm = settings["all"]["base"], settings["all"]["R3"]
    assert base["episodes"] == 200
    assert "gain_points" not in base
    assert arm["episodes"] == 400
    assert list(arm["seeds"]) == ["0", "1"]
    pooled = sum(one["successes"] for one in arm["seeds"].values())
    assert arm["successes"] == pooled
    for one in arm["seeds"].values():
        assert one["gain_points"] == pytest.approx((one["successes"] - base["successes"]) / 2)
    control = settings["all"]["sft"]
    assert "gain_over_control" not in base | control
    over = arm["gain_over_control"]
    assert over["gain_points"] == pytest.approx((arm["successes"] - control["successes"]) / 4)
    assert over["gain_interval"][0] < over["gain_points"] < over["gain_interval"][1]
    assert arm["seeds"]["1"]["gain_over_control"]["p_mcnemar"] <= 1
    written = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert written["suites"] == json.loads(json.dumps(figures["suites"]))
    assert written["command"] == "wmgym experiment"
    assert set(written) == {
        *("base", "suites", "methods", "steps", "control_steps", "seconds", "outcomes"),
        *("command", "seed", "machine", "version"),
    }
    assert "R3-1: training" in said
    shown = table(written)
    [row] = [line for line in shown.splitlines() if line.startswith("| libero_object | all | R3 ")]
    share = f"{100 * arm['successes'] / 400:.1f} %"
    assert row.startswith(f"| libero_object | all | R3 | 400 | {share} |")
    assert row.split(" | ")[9] == f"{over['gain_points']:+.1f}"
    assert "over the control" in shown.splitlines()[0]


def test_seeds_and_settings_of_a_start_are_one_start(trained, tmp_path, monkeypatch):
    """Whatever is the same for all seeds and settings tells no more than one of them."""

    def evaluate(config, **_):
        base = config.out.parent.name == "base"
        return Outcomes(
            {
                e: {
                    "success": (e.init_state % 2 == 0) or (not base and e.task_id < 4),
                    "seconds": 1,
                }
                for e in episodes(config)
            }
        )

    monkeypatch.setattr(module, "evaluate", evaluate)
    figures = experiment(config(tmp_path, arms=("R3",)), "", lambda line: None)
    rows = figures["suites"]["libero_object"]
    starts = [(task, state) for task in range(10) for state in range(40, 50)]
    base = {(t, s): [s % 2 == 0] for t, s in starts}
    once = {(t, s): [s % 2 == 0 or t < 4] for t, s in starts}
    for setting in ("standard", "all"):
        assert rows[setting]["R3"]["interval"] == rate(once)["interval"]
        for key, value in gain([base], [once]).items():
            assert rows[setting]["R3"][key] == value
    assert rows["all"]["R3"]["episodes"] == 400


def test_arms_are_trained_as_they_say_and_their_time_is_told(trained, tmp_path):
    figures = experiment(config(tmp_path), "", lambda line: None, progress=False)
    assert [run.seed for run in trained] == [1, 0, 2, 1]
    assert trained[0].init_from == "base"
    assert trained[1].policy == "base"
    assert trained[1].reward == ARMS["R3"]["reward"]
    assert trained[1].members == PRESETS["small"]["members"]
    assert trained[1].steps == 7
    assert figures["seconds"]["R3-0"]["training"] == 5.0
    assert figures["seconds"]["sft-1"]["training"] == 38.0
    assert figures["seconds"]["base"]["evaluation"] == 300.0


def test_temperatures_are_rows_of_their_own(trained, tmp_path):
    figures = experiment(
        config(tmp_path, temperatures=(1.0, 0.0), arms=("R3",)), "", lambda line: None
    )
    assert list(figures["suites"]) == ["libero_object", "libero_object, temperature 0"]
    assert figures["suites"]["libero_object, temperature 0"]["all"]["R3"]["episodes"] == 400
    assert "| libero_object, temperature 0 | all | base |" in table(figures)


def test_every_outcome_is_in_the_report(trained, tmp_path, monkeypatch):
    def succeeds(episode):
        return episode.task_id == 3 and episode.setting == "jitter" and episode.init_state < 42

    def evaluate(config, **_):
        return Outcomes({e: {"success": succeeds(e), "seconds": 1} for e in episodes(config)})

    monkeypatch.setattr(module, "evaluate", evaluate)
    figures = experiment(config(tmp_path, arms=("R3",)), "", lambda line: None)
    told = figures["outcomes"]["libero_object"]
    expected = {"standard": "0" * 100, "jitter": "0" * 30 + "11" + "0" * 68}
    assert told == {"base": {"0": expected}, "R3": {"0": expected, "1": expected}}


def test_unknown_arms_are_refused(tmp_path):
    for changes, said in (
        ({"arms": ("R4",)}, r"arms=\('R4',\): allowed are some of"),
        ({"arms": ("R3", "R3")}, "arms=.*none twice"),
        ({"settings": ("windy",)}, "settings="),
        ({"seeds": ()}, "seeds="),
        ({"temperatures": (1.0, 1.0)}, "temperatures="),
        ({"steps": 0}, "steps=0"),
        ({"arms": "R3"}, "arms='R3': must be a tuple"),
        ({"seeds": (-3,)}, r"seeds=\(-3,\)"),
        ({"temperatures": (1.0, -1.0)}, "temperatures="),
        ({"workers": 0}, "workers=0"),
    ):
        with pytest.raises(ValueError, match=said):
            config(tmp_path, **changes)
