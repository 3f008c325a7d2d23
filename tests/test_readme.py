"""The README says what the committed reports and examples say, word for word."""

import json
import re
from pathlib import Path

import pytest
from wmgym_agents.compare import overview

from wmgym.assets import asset_path
from wmgym.reports import (
    audit_table,
    memory_table,
    published_table,
    quality_table,
    speed_table,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DETAILS = asset_path("reports", "README.md").read_text()


def test_the_tables_of_the_shipped_world_are_those_of_its_reports():
    world = asset_path("worlds", "libero-small")
    assert quality_table(world) in README
    assert audit_table(world) in README
    assert speed_table(asset_path("reports", "bench_small.json")) in README


def test_the_tables_of_the_published_world_are_those_of_its_report():
    report = asset_path("reports", "bench_published.json")
    assert published_table(report) in README
    assert memory_table(report) in README


def test_the_tables_of_the_experiments_are_those_of_their_reports():
    for name, page in {
        "experiment": README,
        "experiment_r2": DETAILS,
        "experiment_halfway": DETAILS,
    }.items():
        report = json.loads(asset_path("reports", f"{name}.json").read_text())
        assert overview(report) in page


def test_the_errors_of_policies_are_those_of_their_report():
    report = json.loads(asset_path("reports", "where_policies_err.json").read_text())
    for name, rows in report["policies"].items():
        arm = "base" if name == "libero-object-small" else name
        for temperature, row in rows.items():
            line = (
                f"| {arm} | {temperature.split()[1]} | {row['fast']:.3f} | {row['slow']:.4f} | "
                f"{row['gripper']:.4f} | {100 * row['late']:.1f} % | {row['R3']:.4f} |"
            )
            assert line in DETAILS


def test_the_ten_lines_are_the_quickstart_example():
    source = (ROOT / "examples" / "quickstart.py").read_text()
    body = source.split('"""', 2)[2].strip()
    assert body in README


def test_every_extra_is_explained():
    _, section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")
    extras = re.findall(r"^([\w-]+) = \[", section.split("\n[")[0], re.MULTILINE)
    assert "hub" in extras
    assert [e for e in extras if e not in ("all", "dev") and f"\n| `{e}` |" not in README] == []


@pytest.mark.parametrize("page", ["README.md", "assets/reports/README.md"])
def test_every_file_a_page_points_to_exists(page):
    path = ROOT / page
    targets = [re.split(r"[)#]", part)[0] for part in path.read_text().split("](")[1:]]
    local = [t for t in targets if t and not t.startswith("http")]
    assert local
    assert [t for t in local if not (path.parent / t).exists()] == []
