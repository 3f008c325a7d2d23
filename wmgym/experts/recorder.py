"""Records demonstrations of a LIBERO suite as a LeRobot v3 dataset.

A suite is a fixed list of takes: so many of every task from training initial states, some from the
held-out ones, and some that are meant to miss their grasp. A take is a pure function of its
description: it tries seeds until LIBERO's own success check holds at the end of the motion (the
last try is kept as a labelled failure). Physics runs first and only what is kept is rendered, from
the stored states. Workers stage finished takes one by one; when all are there they are assembled in
the order of the list. A killed recording therefore resumes, and ends in the same dataset.

A world model needs to see what a policy under training will do, not only what an expert does. The
executed action is the expert's plus Ornstein-Uhlenbeck noise, with bursts of random motion (and
sometimes a random gripper) away from contact; the expert sees the disturbed state and recovers. The
expert's own action is stored beside the executed one (Laskey et al. 2017, DART).
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import wmgym
from wmgym.data.episodes import HELD_OUT_INIT_STATES, Episode, EpisodeInfo
from wmgym.data.lerobot_writer import assemble, stage_episode, staged_names
from wmgym.envs.simulator import Simulator, initial_states, n_tasks
from wmgym.experts import Expert, ExpertConfig
from wmgym.files import write_text
from wmgym.spaces import ACTION_DIM, CONTROL_HZ, STEP_LIMITS
from wmgym.workers import in_workers

_TRAINING_INIT_STATES = range(HELD_OUT_INIT_STATES.start)
_CAREFUL_PHASES = ("approach", "grasp", "place", "release", "work")
_NOISE_LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2)
_NOISE_DECAY = 0.85
_NOISE_SCALE = np.array([1, 1, 1, 0.3, 0.3, 0.3])
_CAREFUL_SHARE = 0.4
_BURST_STEPS = (3, 10)
_RANDOM_GRIPPER_SHARE = 0.2

_WHICH_TAKES = ("out", "tasks", "episodes", "held_out", "misses")
"""Entries of the configuration on which no single take depends."""


@dataclass(frozen=True)
class RecordConfig:
    """What to record.

    Attributes:
        suite: LIBERO suite.
        out: Folder of the dataset; takes are staged beside it in `<out>.staging`.
        tasks: Task ids; empty means all of the suite.
        episodes: Takes of every task from training initial states.
        held_out: Takes of every task from held-out initial states (40-49), for validation only.
        misses: Takes of every task whose first grasp is off by 3-5 cm and not repeated.
        attempts: Seeds tried for a take before its failure is kept.
        burst_rate: Bursts of random motion per control step away from contact.
        image_size: Height and width of the images, pixels.
        fast_rendering: See `wmgym.envs.simulator.Simulator`.
        seed: Seed of everything random.
        workers: Processes; each holds one simulator of about 0.5 GB.
    """

    suite: str
    out: Path
    tasks: tuple[int, ...] = ()
    episodes: int = 26
    held_out: int = 3
    misses: int = 2
    attempts: int = 4
    burst_rate: float = 0.012
    image_size: int = 128
    fast_rendering: bool = True
    seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.suite not in STEP_LIMITS:
            raise ValueError(f"suite={self.suite!r}: allowed are {sorted(STEP_LIMITS)}")
        if not 0 <= self.held_out <= len(HELD_OUT_INIT_STATES):
            raise ValueError(f"held_out={self.held_out}: allowed are 0...10")
        if min(self.episodes, self.misses) < 0 or min(self.attempts, self.workers) < 1:
            raise ValueError("episodes and misses must be >= 0, attempts and workers >= 1")


@dataclass(frozen=True)
class Take:
    """One entry of the list: a task, an initial state, and whether the grasp shall miss."""

    task_id: int
    kind: str
    index: int
    init_state_id: int

    @property
    def name(self) -> str:
        """Name in the staging area."""
        return f"task{self.task_id:02d}-{self.kind}-{self.index:03d}"


def takes(config: RecordConfig) -> list[Take]:
    """All takes of a recording, in the order of the finished dataset."""
    tasks = config.tasks or tuple(range(n_tasks(config.suite)))
    return [
        Take(task, kind, k, states[k % len(states)])
        for task in tasks
        for kind, count, states in (
            ("train", config.episodes, _TRAINING_INIT_STATES),
            ("miss", config.misses, _TRAINING_INIT_STATES[::-1]),
            ("held-out", config.held_out, HELD_OUT_INIT_STATES),
        )
        for k in range(count)
    ]


class ActionNoise:
    """What is added to the expert's actions; see the module docstring.

    Args:
        rng: Source of randomness.
        level: Standard deviation of the noise added per step to the translation, in units of the
            action; rotations get 0.3 of it.
        burst_rate: Probability per step that a burst begins.
    """

    def __init__(self, rng: np.random.Generator, level: float, burst_rate: float) -> None:
        self._rng, self._level, self._burst_rate = rng, level, burst_rate
        self._walk = np.zeros(6)
        self._burst = np.zeros(ACTION_DIM)
        self._burst_left = 0

    def __call__(self, action: NDArray[np.float32], phase: str) -> NDArray[np.float32]:
        """The disturbed action `(7,)`, within [-1, 1]."""
        careful = phase in _CAREFUL_PHASES
        step = self._rng.normal(size=6) * self._level * _NOISE_SCALE
        self._walk = _NOISE_DECAY * self._walk + step
        noisy = action.astype(np.float64)
        noisy[:6] += self._walk * (_CAREFUL_SHARE if careful else 1.0)
        if self._burst_left == 0 and not careful and self._rng.random() < self._burst_rate:
            self._burst_left = int(self._rng.integers(*_BURST_STEPS))
            self._burst = self._rng.uniform(-1, 1, ACTION_DIM)
            self._burst[3:6] *= 0.3
            keeps_gripper = self._rng.random() > _RANDOM_GRIPPER_SHARE
            self._burst[6] = action[6] if keeps_gripper else np.sign(self._burst[6])
        if self._burst_left > 0:
            self._burst_left -= 1
            noisy[:] = self._burst
        return np.clip(noisy, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class _Run:
    """What physics alone gives of one attempt."""

    states: list[NDArray[np.float64]]
    proprio: list[NDArray[np.float32]]
    actions: list[NDArray[np.float32]]
    clean: list[NDArray[np.float32]]
    success: bool


def _attempt(
    simulator: Simulator, take: Take, config: RecordConfig, attempt: int
) -> tuple[_Run, EpisodeInfo]:
    key = [config.seed, take.task_id, take.index, len(take.kind), attempt]
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    rng = np.random.default_rng(seed)
    level = float(rng.choice(_NOISE_LEVELS))
    offset = (0.0, 0.0)
    if take.kind == "miss":
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.05)
        offset = (float(distance * np.cos(angle)), float(distance * np.sin(angle)))
    speed = float(rng.uniform(0.75, 1.0))
    simulator.reset(initial_states(config.suite, take.task_id)[take.init_state_id], seed=seed)
    actor = Expert(
        simulator.control_env,
        rng,
        ExpertConfig(speed=speed, grasp_offset=offset, give_up=take.kind == "miss"),
    )
    noise = ActionNoise(rng, level, config.burst_rate)
    run = _Run([], [], [], [], False)
    for action in actor:
        if len(run.actions) == STEP_LIMITS[config.suite]:
            break
        executed = noise(action, actor.phase)
        run.states.append(simulator.state())
        run.proprio.append(simulator.proprio())
        run.actions.append(executed)
        run.clean.append(action)
        simulator.step(executed)
    info = EpisodeInfo(
        episode_id=-1,
        length=len(run.actions),
        instruction=simulator.instruction,
        suite=config.suite,
        task_id=take.task_id,
        init_state_id=take.init_state_id,
        seed=seed,
        success=simulator.success,
        extra={
            "kind": take.kind,
            "noise_level": level,
            "speed": speed,
            "attempt": attempt,
            "fixtures": simulator.fixtures(),
        },
    )
    return run, info


def record_take(simulator: Simulator, take: Take, config: RecordConfig) -> Episode:
    """Runs a take until it is accepted, then renders it.

    A take that shall miss is accepted when it fails, any other when it succeeds; the last attempt
    is kept either way, with its label.
    """
    for attempt in range(config.attempts):
        run, info = _attempt(simulator, take, config, attempt)
        if info.success == (take.kind != "miss"):
            break
    images, wrist = [], []
    for state in run.states:
        simulator.set_state(state)
        images.append(simulator.render("agentview"))
        wrist.append(simulator.render("wrist"))
    return Episode(
        info=info,
        start=0,
        images=np.stack(images),
        wrist_images=np.stack(wrist),
        proprio=np.stack(run.proprio),
        actions=np.stack(run.actions),
        clean_actions=np.stack(run.clean),
        sim_states=np.stack(run.states),
    )


@functools.lru_cache(maxsize=1)
def _simulator(suite: str, task_id: int, size: int, fast: bool) -> Simulator:
    return Simulator(suite, task_id, image_size=(size, size), fast_rendering=fast)


def _stage(config: RecordConfig, take: Take) -> bool:
    simulator = _simulator(config.suite, take.task_id, config.image_size, config.fast_rendering)
    episode = record_take(simulator, take, config)
    stage_episode(_staging(config), take.name, episode, fps=CONTROL_HZ)
    return bool(episode.info.success)


def _staging(config: RecordConfig) -> Path:
    return config.out.with_name(config.out.name + ".staging")


def _described(config: RecordConfig) -> dict[str, Any]:
    """The configuration as JSON, without what a dataset does not depend on."""
    described = {**asdict(config), "out": config.out.name, "tasks": list(config.tasks)}
    del described["workers"]
    return described


def _staged(config: RecordConfig) -> set[str]:
    """Names of the takes in the staging area, all of which are of this configuration."""
    folder = _staging(config)
    names, file = set(staged_names(folder)), folder / "config.json"
    mine = {k: v for k, v in _described(config).items() if k not in _WHICH_TAKES}
    if not names:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(mine))
    elif not file.exists():
        raise ValueError(
            f"{folder} holds takes, but no {file.name} that says how they were recorded; remove "
            f"the folder, or if they are of this recording, write {json.dumps(mine)} to that file"
        )
    else:
        theirs = json.loads(file.read_text())
        others = [
            f"{k}={theirs.get(k)!r} (now {v!r})" for k, v in mine.items() if theirs.get(k) != v
        ]
        if others:
            raise ValueError(
                f"{folder} holds takes recorded with {', '.join(others)}; go on with the same, "
                f"choose another folder, or remove that one"
            )
    return names


def record(config: RecordConfig, *, progress: bool = True) -> Path:
    """Records a suite, or goes on with a recording that was interrupted.

    Args:
        config: What to record.
        progress: Show a progress bar on stderr.

    Returns:
        The folder of the finished LeRobot v3 dataset.

    Raises:
        FileExistsError: The dataset is there already.
        ValueError: The takes staged so far were recorded in another way.
        MissingExtraError: LIBERO is not installed.
    """
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists already; remove it or choose another folder")
    everything = takes(config)
    staged = _staged(config)
    todo = [take for take in everything if take.name not in staged]
    done = len(everything) - len(todo)
    with tqdm(total=len(everything), initial=done, unit="ep", disable=not progress) as bar:
        failed = 0
        stage = functools.partial(_stage, config)
        for success in in_workers(stage, todo, config.workers, lambda take: take.task_id):
            failed += not success
            bar.update()
            bar.set_postfix(failed=failed)
    return assemble(
        _staging(config),
        config.out,
        [take.name for take in everything],
        fps=CONTROL_HZ,
        extra_info={"version": wmgym.__version__, "config": _described(config)},
    )
