"""Policies compared on the same episodes: rates, gains and how sure they are.

The first policy is the base. Of every other one, the gain over it is told start by start, with an
interval and a p-value (`wmgym_agents.statistics`), by setting and over all of them; where one arm
is a control, the gain over that too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from wmgym.envs.perturbations import PERTURBATIONS
from wmgym.files import write_text
from wmgym.reports import write_report
from wmgym_agents.outcomes import Outcomes, differences, read
from wmgym_agents.page import comparison_page
from wmgym_agents.statistics import gain, rate

METHODS = (
    "Starts, a task with one of its initial states, are counted; seeds, settings and copies of a "
    "start are averaged. Intervals of 95 %: of rates Wilson's score interval at the effective "
    "number of episodes, of gains Bonett and Price's for pairs. p: McNemar's exact test, by "
    "swapping the policies within starts."
)
_POLICY = ("policy", "weights", "temperature", "image_size", "fast_rendering")


@dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Attributes:
        folders: Two or more folders of evaluations; the others are compared with the first.
        out: The report; a page is written beside it.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("comparison.json")

    def __post_init__(self) -> None:
        if len(set(self.folders)) != len(self.folders) or len(self.folders) < 2:
            names = " ".join(map(str, self.folders))
            raise ValueError(f"folders={names!r}: name two or more different ones")
        if self.out.suffix != ".json":
            raise ValueError(f"out={str(self.out)!r}: name a .json; the page lies beside it")


def compare(config: CompareConfig, command: str) -> dict[str, Any]:
    """Compares evaluations on the episodes that all of them have played, and writes the report.

    Policies may differ in all that is theirs, such as what they see of the scene and the
    temperature of their noise; the episodes must be the same.

    Args:
        config: What to compare.
        command: The line that makes this report.

    Raises:
        ValueError: A folder holds no evaluation, or one of other episodes; the message says how
            they differ.
    """
    found = {str(folder): read(folder) for folder in config.folders}
    first, *others = found
    rules = {
        name: {key: value for key, value in header.items() if key not in _POLICY}
        for name, (header, _) in found.items()
    }
    for name in others:
        differ = differences(rules[first], rules[name])
        if differ:
            raise ValueError(
                f"{first} and {name} are evaluations of different episodes: {'; '.join(differ)}. "
                "Evaluate one of them again, with the settings of the other"
            )
    common = set.intersection(*(set(outcomes) for _, outcomes in found.values()))
    if not common:
        raise ValueError(
            f"{', '.join(found)} have no episode in common: evaluate the same tasks, init_states "
            "and settings"
        )
    arms = {
        name: [Outcomes({e: o for e, o in outcomes.items() if e in common})]
        for name, (_, outcomes) in found.items()
    }
    settings = [name for name in PERTURBATIONS if any(e.setting == name for e in common)]
    figures = {
        "policies": {
            name: {key: header.get(key) for key in _POLICY} for name, (header, _) in found.items()
        },
        **rules[first],
        "episodes": len(common),
        "left_out": {name: len(outcomes) - len(common) for name, (_, outcomes) in found.items()},
        "suites": {rules[first]["suite"]: compared(arms, settings)},
        "methods": METHODS,
    }
    write_report(config.out, figures, command=command, seed=rules[first]["seed"])
    document = json.loads(config.out.read_text())
    write_text(config.out.with_suffix(".html"), comparison_page(document, cells(document)))
    return figures


def compared(
    arms: Mapping[str, Sequence[Outcomes]], settings: Sequence[str], control: str | None = None
) -> dict[str, dict[str, Any]]:
    """Rows of all arms by setting, and over all settings if there are several.

    Args:
        arms: Outcomes of the policies of each arm, one for each seed of its training; the first
            arm is the base.
        settings: Names of perturbations.
        control: An arm that the others are also compared with.
    """
    together = ("all",) if len(settings) > 1 else ()
    return {setting: _rows(arms, setting, control) for setting in (*settings, *together)}


def _rows(
    arms: Mapping[str, Sequence[Outcomes]], setting: str, control: str | None
) -> dict[str, Any]:
    plays = {name: [one.of(setting).plays for one in seeds] for name, seeds in arms.items()}
    base = next(iter(plays))
    rows: dict[str, Any] = {}
    for name, seeds in plays.items():
        rows[name] = {**rate(*seeds)}
        if name != base:
            rows[name] |= gain(plays[base], seeds)
        if control in plays and name not in (base, control):
            rows[name]["gain_over_control"] = gain(plays[control], seeds)
    return rows


def cells(figures: dict[str, Any]) -> list[list[str]]:
    """The rows of a comparison or an experiment as a table, its head first."""
    controlled = _controlled(figures)
    head = ["suite", "setting", "arm", "episodes", "success", "95 %", *_gains_head(controlled)]
    lines = [head]
    for suite, settings in figures["suites"].items():
        for setting, arms in settings.items():
            for arm, row in arms.items():
                low, high = (100 * bound for bound in row["interval"])
                line = [suite, setting, arm, f"{row['episodes']}", _share(row)]
                lines.append([*line, f"{low:.1f} ... {high:.1f}", *_gains(row, controlled)])
    return lines


def _share(row: Mapping[str, Any]) -> str:
    return f"{100 * row['successes'] / row['episodes']:.1f} %"


def _controlled(figures: dict[str, Any]) -> bool:
    """Whether there is a control."""
    return any(
        "gain_over_control" in row
        for settings in figures["suites"].values()
        for arms in settings.values()
        for row in arms.values()
    )


def _gains_head(controlled: bool) -> list[str]:
    return ["gain", "95 %", "p"] + ["over the control", "95 %", "p"] * controlled


def _gains(row: Mapping[str, Any], controlled: bool) -> list[str]:
    return _gain(row) + _gain(row.get("gain_over_control", {})) * controlled


def _gain(row: Mapping[str, Any]) -> list[str]:
    if "gain_points" not in row:
        return [""] * 3
    low, high = row["gain_interval"]
    return [f"{row['gain_points']:+.1f}", f"{low:+.1f} ... {high:+.1f}", f"{row['p_mcnemar']:.2g}"]


def table(figures: dict[str, Any]) -> str:
    """The rows of a comparison or an experiment in Markdown."""
    return _markdown(cells(figures))


def overview(figures: dict[str, Any]) -> str:
    """An arm a row in Markdown: its success in every setting and over all, and that gain in full.

    The gain in a setting stands in parentheses, in bold where its interval of 95 % excludes 0.
    """
    *parts, whole = next(iter(figures["suites"].values()))
    controlled = _controlled(figures)
    lines = [["suite", "arm", *parts, whole, "episodes", *_gains_head(controlled)]]
    for suite, settings in figures["suites"].items():
        for arm, row in settings[whole].items():
            shares = [_share(settings[name][arm]) + _told(settings[name][arm]) for name in parts]
            total = [_share(row), f"{row['episodes']}"]
            lines.append([suite, arm, *shares, *total, *_gains(row, controlled)])
    return _markdown(lines)


def _told(row: Mapping[str, Any]) -> str:
    if "gain_points" not in row:
        return ""
    low, high = row["gain_interval"]
    mark = "**" * (not low <= 0 <= high)
    return f" ({mark}{row['gain_points']:+.1f}{mark})"


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))
