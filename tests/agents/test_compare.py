"""Comparing evaluations: pairs, what must be alike, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wmgym_agents.compare import CompareConfig, compare, overview, table
from wmgym_agents.outcomes import EPISODES, Episode, line, resume
from wmgym_agents.statistics import mcnemar

from wmgym import cli

HEADER = {
    "policy": "p",
    "suite": "libero_object",
    "chunk": 8,
    "max_steps": None,
    "image_size": 128,
    "fast_rendering": True,
    "temperature": 1.0,
    "seed": 7,
    "weights": "aa",
}


def played(folder, solved, settings=("standard",), **header):
    """An evaluation of the first states of two tasks; `solved` are the first outcomes."""
    folder.mkdir()
    resume(folder, HEADER | header)
    episodes = [Episode(t, s, i, 0) for t in (0, 1) for s in settings for i in range(40, 50)]
    with (folder / EPISODES).open("a") as file:
        for episode, success in zip(episodes, solved, strict=False):
            file.write(line(episode, {"success": success, "steps": 9, "seconds": 1.0}))
    return folder


def test_the_same_episodes_are_paired(tmp_path):
    base = played(tmp_path / "base", [True] * 10 + [False] * 10)
    better = played(
        tmp_path / "better",
        [True] * 9 + [False] + [True] * 8 + [False] * 2,
        policy="q",
        weights="b",
    )
    out = tmp_path / "report" / "comparison.json"
    figures = compare(CompareConfig((base, better), out), "wmgym compare")
    rows = figures["suites"]["libero_object"]["standard"]
    assert "gain_points" not in rows[str(base)]
    row = rows[str(better)]
    assert row["successes"] == 17
    assert row["gain_points"] == 35
    assert row["p_mcnemar"] == pytest.approx(mcnemar([1] * 8 + [-1]), rel=1e-3)
    written = json.loads(out.read_text())
    assert written["command"] == "wmgym compare"
    assert written["policies"][str(better)]["policy"] == "q"
    assert list(written["suites"]["libero_object"]) == ["standard"]
    shown = out.with_suffix(".html").read_text()
    for cell in table(written).splitlines()[3].strip("| ").split(" | "):
        assert f"<td>{cell}</td>" in shown


def test_settings_are_told_apart_and_together_by_start(tmp_path):
    both = ("standard", "jitter")
    first = played(tmp_path / "a", [False] * 40, both)
    second = played(tmp_path / "b", ([True] * 5 + [False] * 5) * 4, both)
    figures = compare(CompareConfig((first, second), tmp_path / "c.json"), "")
    rows = figures["suites"]["libero_object"]
    assert list(rows) == ["standard", "jitter", "all"]
    assert rows["all"][str(second)]["episodes"] == 40
    assert rows["all"][str(second)]["interval"] == rows["standard"][str(second)]["interval"]
    head, _, base, better = (line[2:-2].split(" | ") for line in overview(figures).splitlines())
    assert head == ["suite", "arm", "standard", "jitter", "all", "episodes", "gain", "95 %", "p"]
    assert base == ["libero_object", str(first), *["0.0 %"] * 3, "40", "", "", ""]
    assert better[2:7] == [*["50.0 % (**+50.0**)"] * 2, "50.0 %", "40", "+50.0"]


def test_a_report_that_its_page_would_replace_is_refused():
    with pytest.raises(ValueError, match=r"out='x\.html': name a \.json"):
        CompareConfig((Path("a"), Path("b")), Path("x.html"))


def test_gains_that_may_be_none_are_not_bold(tmp_path):
    both = ("standard", "jitter")
    base = played(tmp_path / "base", ([True] * 5 + [False] * 5) * 4, both)
    better = played(tmp_path / "better", ([True] * 6 + [False] * 4) * 4, both)
    figures = compare(CompareConfig((base, better), tmp_path / "c.json"), "")
    assert "| 60.0 % (+10.0) | 60.0 % (+10.0) | 60.0 % | 40 | +10.0 |" in overview(figures)


def test_what_only_one_has_played_is_left_out(tmp_path):
    base, part = played(tmp_path / "base", [True] * 20), played(tmp_path / "part", [False] * 7)
    figures = compare(CompareConfig((base, part), tmp_path / "c.json"), "")
    assert figures["episodes"] == 7
    assert figures["left_out"] == {str(base): 13, str(part): 0}
    none = played(tmp_path / "none", [])
    with pytest.raises(ValueError, match="no episode in common"):
        compare(CompareConfig((base, none), tmp_path / "c.json"), "")


def test_other_episodes_are_refused_and_other_eyes_are_not(tmp_path):
    base = played(tmp_path / "base", [True] * 20)
    foreign = played(tmp_path / "foreign", [True] * 20, image_size=256, temperature=0.0)
    compare(CompareConfig((base, foreign), tmp_path / "c.json"), "")
    other = played(tmp_path / "other", [True] * 20, seed=8, chunk=4)
    with pytest.raises(ValueError, match="different episodes: chunk 8 and 4; seed 7 and 8"):
        compare(CompareConfig((base, other), tmp_path / "c.json"), "")
    with pytest.raises(ValueError, match="holds no evaluation"):
        compare(CompareConfig((base, tmp_path / "absent")), "")
    for folders in ((base,), (base, base)):
        with pytest.raises(ValueError, match="two or more different"):
            CompareConfig(folders)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    base = played(tmp_path / "base", [True] * 10 + [False] * 10)
    better = played(tmp_path / "better", [True] * 19)
    out = tmp_path / "comparison.json"
    words = ["wmgym", "compare", base, better, "--out", out]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    cli.main()
    printed = capsys.readouterr().out
    assert printed.startswith(table(json.loads(out.read_text())))
    assert f"{base}: 1 episodes left out" in printed
