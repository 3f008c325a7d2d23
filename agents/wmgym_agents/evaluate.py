"""Evaluation in LIBERO: how often a policy solves its tasks in real physics.

The protocol is the published one: LIBERO's stored initial states, ten steps to settle, chunks of
eight actions open loop, the step limit of the suite, success by LIBERO's own check. By default the
held-out initial states 40-49 are used; `init_states` 0-49 in one setting is the published run of 50
episodes a task. Settings other than "standard" start from perturbed copies of these states
(`wmgym.envs.perturbations`); suites may be LIBERO-PRO's, such as "libero_object_swap".

What an episode is, its noise included, follows from seed, task, initial state, setting and copy, so
two policies meet the same episodes and are compared pair by pair. Finished episodes are appended to
`episodes.jsonl`; an interrupted evaluation goes on with the others. Pictures are made where the
policy looks, once per chunk; videos of failures repeat those episodes afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from wmgym.envs.libero import LiberoEnv
from wmgym.envs.perturbations import PERTURBATIONS
from wmgym.envs.simulator import instruction, n_tasks
from wmgym.extras import require
from wmgym.files import complete_lines, write_text
from wmgym.recording.video import VideoWriter
from wmgym.reports import write_report
from wmgym.spaces import ACTION_DIM, CONTROL_HZ
from wmgym.training import seed_of
from wmgym.workers import in_workers
from wmgym_agents.page import page
from wmgym_agents.policy import FlowVLA, Observation
from wmgym_agents.statistics import rate

EPISODES, REPORT = "episodes.jsonl", "report.json"
_JOB = 10


class Policy(Protocol):
    """What can be evaluated."""

    def reset(self, seed: int) -> None:
        """Begins an episode; a policy that draws must draw from this seed."""

    def act(self, observation: Observation) -> NDArray[np.floating]:
        """A chunk `(1, T, 7)` of raw LIBERO actions for one observation."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
        policy: Name or folder of a `FlowVLA`, or `module:function` that returns any `Policy`.
        out: Folder of episodes, report and videos.
        suite: LIBERO suite, or one of LIBERO-PRO's.
        tasks: Its tasks; None means all.
        init_states: Stored initial states of every task.
        settings: Names in `PERTURBATIONS`.
        copies: Episodes per initial state in settings that draw something.
        chunk: Actions executed before the policy looks again.
        max_steps: Control steps of an episode; None means the suite's published limit.
        image_size: Pixels of the pictures, height and width.
        fast_rendering: How pictures are drawn: as those the policy was trained on.
        temperature: Size of the noise that a `FlowVLA` denoises; the published protocol has 1.
        seed: Seed of perturbations, fixtures and the policy's noise.
        workers: Simulator processes.
        videos: Videos of failed episodes, per setting.
    """

    policy: str
    out: Path
    suite: str = "libero_object"
    tasks: tuple[int, ...] | None = None
    init_states: tuple[int, ...] = tuple(range(40, 50))
    settings: tuple[str, ...] = ("standard",)
    copies: int = 1
    chunk: int = 8
    max_steps: int | None = None
    image_size: int = 128
    fast_rendering: bool = True
    temperature: float = 1.0
    seed: int = 7
    workers: int = 2
    videos: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.settings) - set(PERTURBATIONS))
        if unknown or not self.settings:
            raise ValueError(f"settings={self.settings}: allowed are {list(PERTURBATIONS)}")
        if min(self.copies, self.chunk, self.workers) < 1 or not self.init_states:
            raise ValueError("copies, chunk and workers must be >= 1, init_states not empty")


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

    def seed(self, config: EvaluationConfig) -> int:
        """Of everything random in it."""
        settings = list(PERTURBATIONS).index(self.setting)
        return seed_of(config.seed, self.task_id, settings, self.init_state, self.copy) % 2**31


class Outcomes(dict[Episode, dict[str, Any]]):
    """Finished episodes with `success`, `steps` and `seconds`."""

    def successes(self, setting: str) -> dict[Episode, bool]:
        """Whether each episode of a setting was solved."""
        return {e: o["success"] for e, o in sorted(self.items()) if e.setting == setting}


def episodes(config: EvaluationConfig) -> list[Episode]:
    """All episodes, task by task."""
    tasks = range(n_tasks(config.suite)) if config.tasks is None else config.tasks
    return [
        Episode(task_id, setting, init_state, copy)
        for task_id in tasks
        for setting in config.settings
        for init_state in config.init_states
        for copy in range(1 if setting == "standard" else config.copies)
    ]


class _Flow:
    """A `FlowVLA` as a policy to evaluate: noise is drawn for the episode, none while denoising."""

    def __init__(self, policy: str, temperature: float) -> None:
        self.policy = FlowVLA.from_pretrained(policy)
        self.temperature = temperature

    def reset(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        return self.policy.act(observation, self.generator, self.temperature)


def load_policy(policy: str, temperature: float = 1.0) -> Policy:
    """A policy by name, folder, or `module:function` that makes it.

    Args:
        policy: The policy.
        temperature: Size of the noise that a `FlowVLA` denoises.

    Raises:
        CheckpointError: There is no such policy, or its files are damaged.
        ValueError: There is no such function.
    """
    module, colon, function = policy.partition(":")
    if not colon or Path(policy).exists():
        return _Flow(policy, temperature)
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy={policy!r} cannot be made: {error}") from error


@functools.lru_cache(maxsize=1)
def _policy(policy: str, temperature: float) -> Policy:
    torch.set_num_threads(1)
    return load_policy(policy, temperature)


@functools.lru_cache(maxsize=1)
def _simulation(config: EvaluationConfig, filmed: bool) -> LiberoEnv:
    return LiberoEnv(
        suite=config.suite,
        image_size=config.image_size,
        fast_rendering=config.fast_rendering,
        action_chunk=None if filmed else config.chunk,
        max_steps=config.max_steps,
        max_simulators=1,
    )


def play(
    policy: Policy, env: LiberoEnv, episode: Episode, config: EvaluationConfig
) -> dict[str, Any]:
    """Plays one episode.

    Args:
        policy: Who acts.
        env: An environment of the suite; without `action_chunk`, every step is filmed.
        episode: What to play.
        config: How.

    Returns:
        `success`, `steps` and `seconds`; when filmed, `frames` `(n, H, W, 3)` as well.

    Raises:
        ValueError: The policy's chunk is too short or not for one observation.
    """
    began, filmed = time.perf_counter(), env.action_space.shape == (ACTION_DIM,)
    seed = episode.seed(config)
    policy.reset(seed)
    env.init_state_transform = PERTURBATIONS[episode.setting]
    options = {"task_id": episode.task_id, "init_state": episode.init_state}
    seen, info = env.reset(seed=seed, options=options)
    frames, over = [seen["image"]], False
    while not over:
        chunk = policy.act(
            {
                "image": seen["image"][None],
                "proprio": seen["proprio"][None],
                "instruction": [info["instruction"]],
            }
        )
        if np.ndim(chunk) != 3 or len(chunk) != 1 or len(chunk[0]) < config.chunk:
            raise ValueError(
                f"the policy returned actions of shape {np.shape(chunk)}, expected (1, T, 7) with "
                f"T >= {config.chunk}"
            )
        for action in chunk[0, : config.chunk] if filmed else chunk[:, : config.chunk]:
            seen, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            frames.append(seen["image"])
            if over:
                break
    outcome = {
        "success": bool(info["success"]),
        "steps": int(info["frame_index"]),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return {**outcome, "frames": np.stack(frames)} if filmed else outcome


def _play(
    job: Sequence[Episode], config: EvaluationConfig, *, filmed: bool = False
) -> list[tuple[Episode, dict[str, Any]]]:
    env = _simulation(config, filmed)
    policy = _policy(config.policy, config.temperature)
    return [(episode, play(policy, env, episode, config)) for episode in job]


def _jobs(left: Sequence[Episode]) -> list[list[Episode]]:
    """Episodes in parts of one task: making its simulator takes as long as two episodes."""
    jobs = []
    for _, group in itertools.groupby(sorted(left), key=lambda episode: episode.task_id):
        task = list(group)
        jobs += [task[first : first + _JOB] for first in range(0, len(task), _JOB)]
    return jobs


def evaluate(config: EvaluationConfig, *, progress: bool = True) -> Outcomes:
    """Plays all episodes that are not yet in `config.out`, and films failures if asked to.

    Args:
        config: What to evaluate.
        progress: Show a progress bar on stderr.

    Returns:
        The outcomes of all episodes.

    Raises:
        CheckpointError: The policy cannot be loaded.
        ValueError: `config.out` holds an evaluation with other settings.
        MissingExtraError: LIBERO is not installed.
    """
    require("libero.libero", "libero")
    load_policy(config.policy, config.temperature)
    config.out.mkdir(parents=True, exist_ok=True)
    wanted = episodes(config)
    done = _read(config)
    left = [episode for episode in wanted if episode not in done]
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(left), disable=not progress)
    with bar, (config.out / EPISODES).open("a") as file:
        run = functools.partial(_play, config=config)
        for results in in_workers(run, _jobs(left), config.workers):
            for episode, outcome in results:
                done[episode] = outcome
                file.write(json.dumps(dataclasses.asdict(episode) | outcome) + "\n")
            file.flush()
            solved = sum(o["success"] for o in done.values())
            bar.update(len(results))
            bar.set_postfix(success=f"{100 * solved / len(done):.1f} %")
    outcomes = Outcomes({episode: done[episode] for episode in wanted})
    _film(config, outcomes)
    return outcomes


def _film(config: EvaluationConfig, outcomes: Outcomes) -> None:
    """Repeats some failed episodes with a picture at every step."""
    failed = []
    for setting in config.settings:
        solved = outcomes.successes(setting)
        failed += [episode for episode, success in solved.items() if not success][: config.videos]
    left = [episode for episode in failed if not _video(config, episode).exists()]
    if left:
        run = functools.partial(_play, config=config, filmed=True)
        jobs = [[episode] for episode in left]
        for [(episode, outcome)] in in_workers(run, jobs, config.workers):
            path = _video(config, episode)
            path.parent.mkdir(exist_ok=True)
            with VideoWriter(path, CONTROL_HZ) as video:
                for frame in outcome["frames"]:
                    video.write(frame)


def _video(config: EvaluationConfig, episode: Episode) -> Path:
    e = episode
    name = f"{e.setting}-task{e.task_id}-state{e.init_state}-{e.copy}.mp4"
    return config.out / "videos" / name


_FIXED = (
    "policy",
    "suite",
    "chunk",
    "max_steps",
    "image_size",
    "fast_rendering",
    "temperature",
    "seed",
)


def _read(config: EvaluationConfig) -> dict[Episode, dict[str, Any]]:
    """Finished episodes of an earlier call, after a first line that says what they are."""
    path = config.out / EPISODES
    settings = {name: getattr(config, name) for name in _FIXED}
    lines = complete_lines(path)
    if lines and json.loads(lines[0]) != settings:
        raise ValueError(
            f"{path} is of another evaluation, {lines[0].strip()}, not {json.dumps(settings)}: "
            "choose another folder, or remove it"
        )
    write_text(path, "".join(lines or [json.dumps(settings) + "\n"]))
    done = {}
    for line in lines[1:]:
        entry = json.loads(line)
        episode = Episode(**{f.name: entry.pop(f.name) for f in dataclasses.fields(Episode)})
        done[episode] = entry
    return done


def report(config: EvaluationConfig, outcomes: Outcomes, command: str) -> dict[str, Any]:
    """Writes `report.json` and `index.html` into `config.out`, and returns the figures.

    Args:
        config: What was evaluated.
        outcomes: What `evaluate` returned.
        command: The line that makes this report.
    """
    tasks = sorted({episode.task_id for episode in outcomes})
    figures = {
        "policy": config.policy,
        "suite": config.suite,
        "instructions": {str(task): instruction(config.suite, task) for task in tasks},
        "settings": summary(outcomes, config.settings),
        "seconds_per_episode": round(np.mean([o["seconds"] for o in outcomes.values()]), 2),
    }
    write_report(config.out / REPORT, figures, command=command, seed=config.seed)
    document = json.loads((config.out / REPORT).read_text())
    videos = [path.relative_to(config.out) for path in sorted(config.out.glob("videos/*.mp4"))]
    write_text(config.out / "index.html", page(document, videos))
    return figures


def summary(outcomes: Outcomes, settings: Sequence[str]) -> dict[str, Any]:
    """Success rates by setting and task, with Wilson intervals."""
    figures: dict[str, Any] = {}
    for setting in settings:
        solved = outcomes.successes(setting)
        tasks = sorted({episode.task_id for episode in solved})
        figures[setting] = {
            **rate(list(solved.values())),
            "tasks": {
                str(task): rate([s for e, s in solved.items() if e.task_id == task])
                for task in tasks
            },
        }
    return figures
