"""Episodes of an evaluation and what came of them, in memory and on disk.

`episodes.jsonl` begins with a line that says what its episodes are episodes of; every further line
is one of them. It is appended to, episode by episode, and bears a killed process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmgym.envs.perturbations import PERTURBATIONS
from wmgym.files import complete_lines, json_lines, write_text
from wmgym.training import seed_of
from wmgym_agents.statistics import Plays

EPISODES = "episodes.jsonl"


@dataclass(frozen=True, order=True)
class Episode:
    """One episode to play.

    Attributes:
        task_id: Task of the suite.
        setting: Name of the perturbation.
        init_state: Stored initial state.
        copy: Number of the perturbed copy.
    """

    task_id: int
    setting: str
    init_state: int
    copy: int

    def seed(self, evaluation: int) -> int:
        """Of everything random in it, for the seed of an evaluation.

        It counts on the order of `PERTURBATIONS`: new ones belong at the end.
        """
        setting = list(PERTURBATIONS).index(self.setting)
        return seed_of(evaluation, self.task_id, setting, self.init_state, self.copy) % 2**31


class Outcomes(dict[Episode, dict[str, Any]]):
    """Finished episodes with `success`, `steps` and `seconds`, and `error` where one failed."""

    def of(self, setting: str) -> Outcomes:
        """The episodes of a setting, or of "all", in order."""
        return Outcomes(
            (episode, outcome)
            for episode, outcome in sorted(self.items(), key=lambda item: item[0])
            if setting in (episode.setting, "all")
        )

    @property
    def plays(self) -> Plays:
        """Successes by start, a task with one of its initial states."""
        plays: dict[Hashable, list[bool]] = {}
        for episode, outcome in self.items():
            plays.setdefault((episode.task_id, episode.init_state), []).append(outcome["success"])
        return plays

    @property
    def errors(self) -> int:
        """Number of episodes that broke off, and count as failures."""
        return sum("error" in outcome for outcome in self.values())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two evaluations do not have in common."""
    names = dict.fromkeys((*before, *now))
    return [
        f"{name} {before.get(name)!r} and {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def read(folder: Path) -> tuple[dict[str, Any], Outcomes]:
    """What an evaluation is of, and its finished episodes.

    Raises:
        ValueError: There is no evaluation in this folder, or a line is damaged.
    """
    path = folder / EPISODES
    entries = json_lines(path)
    if not entries:
        raise ValueError(f"{folder} holds no evaluation: there is no {EPISODES}, or nothing in it")
    outcomes, fields = Outcomes(), [field.name for field in dataclasses.fields(Episode)]
    for number, entry in enumerate(entries[1:], start=2):
        try:
            episode = Episode(**{name: entry.pop(name) for name in fields})
            outcomes[episode] = entry | {"success": bool(entry["success"])}
        except KeyError as missing:
            raise ValueError(
                f"{path}, line {number} is damaged: it has no {missing}. Remove that line, and the "
                "episode is played again"
            ) from None
    return entries[0], outcomes


def resume(folder: Path, header: dict[str, Any]) -> Outcomes:
    """The finished episodes of an earlier call; makes the file ready for more.

    Args:
        folder: Folder of the evaluation.
        header: What it is an evaluation of.

    Raises:
        ValueError: The folder holds another evaluation, or a line is damaged.
    """
    path = folder / EPISODES
    lines = complete_lines(path)
    if not lines:
        write_text(path, json.dumps(header) + "\n")
        return Outcomes()
    before, outcomes = read(folder)
    differ = differences(before, header)
    if differ:
        raise ValueError(
            f"{path} is of another evaluation; before and now: {'; '.join(differ)}. Choose "
            "another --out, or delete that folder"
        )
    write_text(path, "".join(lines))  # without half a line that a killed process left
    return outcomes


def line(episode: Episode, outcome: Mapping[str, Any]) -> str:
    """An episode as a line of the file."""
    return json.dumps({**dataclasses.asdict(episode), **outcome}) + "\n"
