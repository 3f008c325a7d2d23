"""Reports say where they come from, and appear whole."""

from __future__ import annotations

import json
import os
import platform

import numpy as np
import pytest
import torch

import wmgym
from wmgym import reports
from wmgym.reports import audit_table, machine, write_report

FIGURES = {"psnr": 30.5, "per_step": {"psnr": [31.0, 30.0]}}


def test_a_report_names_command_seed_machine_and_version(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_report(path, FIGURES, command="wmgym evaluate --seed 3", seed=3)
    assert json.loads(path.read_text()) == {
        **FIGURES,
        "command": "wmgym evaluate --seed 3",
        "seed": 3,
        "machine": machine(),
        "version": wmgym.__version__,
    }
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_figures_that_are_not_finite_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    figures = {"psnr": inf, "chunks": {"real": [np.float64(nan), 1.0, (-inf, 2)]}, "n": 3}
    write_report(tmp_path / "report.json", figures, command="", seed=0)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    expected = {"psnr": None, "chunks": {"real": [None, 1.0, [None, 2]]}, "n": 3}
    assert {name: report[name] for name in figures} == expected


def test_an_undefined_correlation_has_its_place_in_the_table(tmp_path):
    names = ("r3", "r3_within", "r2", "tip")
    figures = {"spearman_object": float("nan"), **{f"spearman_{name}": 0.5 for name in names}}
    counts = {"n_object_chunks": 0, "n_chunks": 5, "n_starts": 1, "pairs_wrong": 0.25}
    write_report(tmp_path / "audit.json", {**figures, **counts}, command="", seed=0)
    table = audit_table(tmp_path)
    assert "(0 chunks that move one) | undefined |" in table
    assert table.count("| 0.500 |") == 4


def test_the_machine_is_described_in_one_line():
    line = machine()
    assert "\n" not in line
    for part in (f"{os.cpu_count()} cores", "GiB", platform.python_version(), torch.__version__):
        assert part in line


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, FIGURES, command="one", seed=0)
    with pytest.raises(TypeError):
        write_report(path, {"psnr": torch.zeros(1)}, command="two", seed=1)
    assert json.loads(path.read_text())["command"] == "one"


def test_an_unknown_processor_is_described_all_the_same(monkeypatch):
    def absent(self):
        raise FileNotFoundError

    monkeypatch.setattr(reports.Path, "read_text", absent)
    assert platform.machine() in machine() or platform.processor() in machine()
