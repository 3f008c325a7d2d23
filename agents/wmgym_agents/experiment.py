"""The experiment: does fine-tuning in imagination raise success in real physics?

A base policy is fine-tuned in several ways, the arms, and every result plays the same episodes in
LIBERO as the base did: held-out initial states and perturbed copies of them. Arms are compared with
the base, and with the arm `sft`, pair by pair. That one is the control: the same policy, trained on
by supervision. Every stage goes on where it was interrupted, so the command may be given again with
more arms, seeds or settings; what is finished is not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wmgym.envs.perturbations import PERTURBATIONS
from wmgym.files import json_lines
from wmgym.reports import write_report
from wmgym.settings import check_choices, check_distinct, check_numbers
from wmgym_agents.compare import METHODS, compared, table
from wmgym_agents.evaluate import EvaluationConfig, evaluate
from wmgym_agents.grpo import PRESETS, GRPOConfig, Preset, grpo
from wmgym_agents.outcomes import Outcomes
from wmgym_agents.sft import SFTConfig, sft

CONTROL = "sft"
ARMS: dict[str, dict[str, Any]] = {
    "R1": {"reward": "R1"},
    "R2": {"reward": "R2"},
    "R3": {"reward": "R3"},
    "R3-closed-loop": {"reward": "R3", "chunks": 3, "starts": 8},
}
"""What each arm changes in the preset of GRPO."""

Played: TypeAlias = dict[str, dict[int, dict[float, Outcomes]]]
"""Outcomes by arm, seed and temperature."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What to compare.

    Attributes:
        base: Policy to start from: name of a shipped one, or folder.
        data: Folders of the demonstrations: starts of the imagined rollouts, and of the control.
        out: Folder of all runs and evaluations, and of `experiment.json`.
        suite: LIBERO suite.
        arms: Names in `ARMS`, and "sft" for the control.
        seeds: Seeds of training; every arm is trained once for each.
        preset: Preset of GRPO.
        steps: RFT steps.
        control_steps: Optimizer steps of the control; choose as many as take as long as the RFT.
        control_learning_rate: Its peak learning rate.
        init_states: Initial states of the episodes.
        settings: Names of perturbations.
        copies: Episodes per initial state in settings that draw something.
        temperatures: Sizes of the noise that policies denoise; the first is the one of the arms'
            names, the others are further rows of the report, arms and base alike.
        workers: Simulator processes.
    """

    base: str
    data: Path
    out: Path
    suite: str = "libero_object"
    arms: tuple[str, ...] = ("R3", "sft", "R3-closed-loop", "R1", "R2")
    seeds: tuple[int, ...] = (0,)
    preset: Preset = "small"
    steps: int = 400
    control_steps: int = 2000
    control_learning_rate: float = 2e-4
    init_states: tuple[int, ...] = tuple(range(40, 50))
    settings: tuple[str, ...] = ("standard", "jitter")
    copies: int = 1
    temperatures: tuple[float, ...] = (1.0,)
    workers: int = 2

    def __post_init__(self) -> None:
        check_choices(self, arms=(CONTROL, *ARMS), settings=PERTURBATIONS, preset=PRESETS)
        check_distinct(self, "seeds", "temperatures", "init_states")
        check_numbers(self, ">= 1", "steps", "control_steps", "copies", "workers")
        check_numbers(self, "> 0", "control_learning_rate")
        seeds = all(type(seed) is int and seed >= 0 for seed in self.seeds)
        if not seeds or not all(0 <= size < math.inf for size in self.temperatures):
            raise ValueError(
                f"seeds={self.seeds}, temperatures={self.temperatures}: allowed are ints >= 0, and "
                "finite numbers >= 0"
            )


def experiment(
    config: ExperimentConfig, command: str, say: Callable[[str], None], *, progress: bool = True
) -> dict[str, Any]:
    """Runs what is not done yet, and writes `experiment.json` after every arm.

    Args:
        config: What to compare.
        command: The line that makes this report.
        say: Called with a line per stage.
        progress: Show progress bars.

    Returns:
        The figures of the report.
    """
    played: Played = {"base": {0: _play(config, config.base, "base", progress)}}
    seconds = {"base": {"evaluation": _evaluation_seconds(played["base"][0], config)}}
    figures = _figures(config, played, seconds)
    for seed in config.seeds:
        for arm in config.arms:
            name = f"{arm}-{seed}"
            say(f"{name}: training")
            policy = _train(config, arm, seed, progress)
            say(f"{name}: evaluation")
            outcomes = _play(config, str(policy), name, progress)
            played.setdefault(arm, {})[seed] = outcomes
            seconds[name] = {
                "training": round(_training_seconds(config.out / name / "log.jsonl"), 1),
                "evaluation": _evaluation_seconds(outcomes, config),
            }
            figures = _figures(config, played, seconds)
            write_report(
                config.out / "experiment.json", figures, command=command, seed=config.seeds[0]
            )
            for line in table(figures).splitlines():
                say(line)
    return figures


def _train(config: ExperimentConfig, arm: str, seed: int, progress: bool) -> Path:
    out = config.out / f"{arm}-{seed}"
    if arm == CONTROL:
        control = SFTConfig(
            data=(config.data,),
            out=out,
            init_from=config.base,
            steps=config.control_steps,
            learning_rate=config.control_learning_rate,
            warmup=100,
            seed=seed + 1,  # not the windows that the base began with
        )
        return sft(control, progress=progress)
    changes = PRESETS[config.preset] | ARMS[arm]
    settings = GRPOConfig(
        policy=config.base,
        out=out,
        suite=config.suite,
        dataset=config.data,
        steps=config.steps,
        seed=seed,
        **changes,
    )
    return grpo(settings, progress=progress)


def _play(
    config: ExperimentConfig, policy: str, name: str, progress: bool
) -> dict[float, Outcomes]:
    """Outcomes at every temperature."""
    played = {}
    for temperature in config.temperatures:
        settings = EvaluationConfig(
            policy=policy,
            out=config.out / name / f"temperature-{temperature:g}",
            suite=config.suite,
            init_states=config.init_states,
            settings=config.settings,
            copies=config.copies,
            temperature=temperature,
            workers=config.workers,
        )
        played[temperature] = evaluate(settings, progress=progress)
    return played


def _training_seconds(log: Path) -> float:
    """Wall-clock of a run, over all its sessions."""
    total = before = 0.0
    for entry in json_lines(log):
        if entry["group"] in ("rft", "train"):
            now = entry["seconds"]
            total += now - before if now > before else now
            before = now
    return total


def _evaluation_seconds(played: dict[float, Outcomes], config: ExperimentConfig) -> float:
    """Time of the evaluation at the first temperature."""
    outcomes = played[config.temperatures[0]]
    return round(sum(o["seconds"] for o in outcomes.values()) / config.workers, 1)


def _figures(
    config: ExperimentConfig, played: Played, seconds: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Rates of all arms, seeds, settings and temperatures; gains over the base and the control.

    Every single outcome is kept as well, so that arms of another time can be paired with these.
    """
    suites: dict[str, Any] = {}
    outcomes_of: dict[str, Any] = {}
    for temperature in config.temperatures:
        first = temperature == config.temperatures[0]
        name = config.suite if first else f"{config.suite}, temperature {temperature:g}"
        arms = {
            arm: {seed: outcomes[temperature] for seed, outcomes in seeds.items()}
            for arm, seeds in played.items()
        }
        suites[name] = _rows(arms, config.settings)
        outcomes_of[name] = {
            arm: {str(seed): _digits(outcomes, config.settings) for seed, outcomes in seeds.items()}
            for arm, seeds in arms.items()
        }
    return {
        "base": config.base,
        "suites": suites,
        "methods": METHODS,
        "steps": config.steps,
        "control_steps": config.control_steps,
        "seconds": seconds,
        "outcomes": outcomes_of,
    }


def _digits(outcomes: Outcomes, settings: tuple[str, ...]) -> dict[str, str]:
    """A digit per episode by setting, 1 where it succeeded, in order of task, state and copy."""
    return {
        setting: "".join(str(int(o["success"])) for o in outcomes.of(setting).values())
        for setting in settings
    }


def _rows(
    arms: dict[str, dict[int, Outcomes]], settings: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Rows of all arms by setting, each with those of its seeds."""
    policies = {arm: [*seeds.values()] for arm, seeds in arms.items()}
    rows = compared(policies, settings, CONTROL)
    compared_with = {arm: policies[arm] for arm in ("base", CONTROL) if arm in policies}
    for arm, seeds in arms.items():
        for seed, outcomes in seeds.items() if arm != "base" else ():
            alone = compared({**compared_with, arm: [outcomes]}, settings, CONTROL)
            for setting, row in alone.items():
                rows[setting][arm].setdefault("seeds", {})[str(seed)] = row[arm]
    return rows
