"""The experiment: does fine-tuning in imagination raise success in real physics?

A base policy is fine-tuned in several ways, the arms, and every result plays the same episodes in
LIBERO as the base did: held-out initial states and perturbed copies of them. Arms are compared with
the base pair by pair. One of them, `sft`, is the control: the same policy, trained on by
supervision. Every stage goes on where it was interrupted, so the command may be given again with
more arms, seeds or settings; what is finished is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wmgym.reports import write_report
from wmgym_agents.evaluate import EvaluationConfig, Outcomes, evaluate
from wmgym_agents.grpo import PRESETS, GRPOConfig, Preset, grpo
from wmgym_agents.sft import SFTConfig, sft
from wmgym_agents.statistics import gain, rate

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
        allowed = (CONTROL, *ARMS)
        if not set(self.arms) <= set(allowed) or not self.seeds or not self.temperatures:
            raise ValueError(
                f"arms={self.arms}, seeds={self.seeds}, temperatures={self.temperatures}: at least "
                f"one of each is needed; allowed arms are {allowed}"
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
    """Time spent on the steps of a run, over all its sessions."""
    total = before = 0.0
    for entry in map(json.loads, log.read_text().splitlines()):
        if entry["group"] == "rft":
            total += entry["rollout_s"] + entry["update_s"]
        elif entry["group"] == "train":
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
    """Rates of all arms, seeds, settings and temperatures, and gains over the base."""
    suites = {}
    for temperature in config.temperatures:
        first = temperature == config.temperatures[0]
        name = config.suite if first else f"{config.suite}, temperature {temperature:g}"
        suites[name] = {
            setting: _rates(played, temperature, setting) for setting in (*config.settings, "all")
        }
    return {
        "base": config.base,
        "suites": suites,
        "steps": config.steps,
        "control_steps": config.control_steps,
        "seconds": seconds,
    }


def _rates(played: Played, temperature: float, setting: str) -> dict[str, Any]:
    """Rows of all arms."""
    base = _solved(played["base"][0][temperature], setting)
    rates: dict[str, Any] = {}
    for arm, seeds in played.items():
        by_seed = {seed: _solved(at[temperature], setting) for seed, at in seeds.items()}
        row: dict[str, Any] = dict(rate([s for solved in by_seed.values() for s in solved]))
        if arm != "base":
            row |= gain(base, *by_seed.values())
            row["seeds"] = {
                str(seed): {**rate(solved), **gain(base, solved)}
                for seed, solved in by_seed.items()
            }
        rates[arm] = row
    return rates


def _solved(outcomes: Outcomes, setting: str) -> list[bool]:
    """Outcomes of a setting, or of all, always in the same order."""
    return [o["success"] for e, o in sorted(outcomes.items()) if setting in (e.setting, "all")]


def table(figures: dict[str, Any]) -> str:
    """The report as a table in Markdown."""
    return "\n".join(_lines(figures))


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    yield "| suite | starts | arm | success | 95 % | gain | 95 % | p |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for suite, settings in figures["suites"].items():
        for setting, arms in settings.items():
            for arm, row in arms.items():
                share = 100 * row["successes"] / row["episodes"]
                low, high = (100 * bound for bound in row["interval"])
                cells = [suite, setting, arm, f"{share:.1f} %", f"{low:.1f} ... {high:.1f}"]
                if "gain_points" in row:
                    least, most = row["gain_interval"]
                    cells += [f"{row['gain_points']:+.1f}", f"{least:+.1f} ... {most:+.1f}"]
                    cells += [f"{row['p_mcnemar']:.2g}"]
                else:
                    cells += [""] * 3
                yield f"| {' | '.join(cells)} |"
