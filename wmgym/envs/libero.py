"""`LiberoEnv`: LIBERO's simulator behind the contract it shares with the imagined environment.

A thin shell around `wmgym.envs.simulator.Simulator`: it chooses task, initial state and fixture
poses from Gymnasium's seed, counts control steps, and asks for pictures once per `step`, which is
where the time goes. A chunk of `T` actions therefore costs `T` steps of physics and one rendering.

Observations and actions: `wmgym.spaces`. Step limits: the published protocol of LIBERO evaluations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import logger
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from wmgym.data.episodes import HELD_OUT_INIT_STATES, SPLITS, Split
from wmgym.envs.simulator import SETTLE_STEPS, Simulator, initial_states, n_tasks
from wmgym.spaces import (
    ACTION_DIM,
    CONTROL_HZ,
    STEP_LIMITS,
    action_space,
    check_actions,
    check_integer,
    check_tasks,
    observation_space,
)

InitStateTransform = Callable[
    [Simulator, NDArray[np.float64], np.random.Generator], NDArray[np.float64]
]
"""Changes an initial state `(S,)` before an episode starts from it, e.g. moves an object.

Called when the fixtures are placed; it may move them, and may leave the scene in any state."""

OPTIONS = ("task_id", "init_state", "fixture_seed")

_LARGEST_IMAGE = (480, 640)


class LiberoEnv(gym.Env):
    """One LIBERO suite, `LIBERO-v0`: a task and an initial state per episode.

    Reward is 1 when LIBERO's own check finds the task solved, which terminates the episode, and 0
    otherwise. The step limit truncates it. Infos have `instruction`, `suite`, `task_id`,
    `init_state_id` and `episode_id` (both the index of the stored initial state, -1 for a state
    that was given in full), `frame_index` (control steps so far), `fixture_seed` and `success`.

    Simulators are made when an episode needs them and kept per task. `env.unwrapped.simulator` has
    the flattened MuJoCo state, the poses of objects and fixtures, and renders without stepping.

    Args:
        suite: LIBERO suite, see `wmgym.spaces.SUITES`.
        tasks: Ids of the tasks to draw from; None means all of the suite.
        image_size: Height and width in pixels, or one number for both.
        cameras: `("agentview",)` or `("agentview", "wrist")`.
        action_chunk: Control steps `T` per call of `step`; None means actions `(7,)`.
        split: Initial states to draw from: "all", "train" (0-39) or "held_out" (40-49).
        max_steps: Control steps before truncation; None means the suite's published limit.
        settle_steps: Control steps without motion before an episode starts: objects of the stored
            states hang in the air. 0 starts from exactly the given state.
        fast_rendering: Simplified meshes and no mirror images, see `Simulator`.
        render_mode: None or "rgb_array".
        init_state_transform: Applied to every initial state before the scene settles, such as a
            `wmgym.envs.perturbations.Perturbation`; called with the simulator, the state and the
            environment's generator.
        max_simulators: Tasks whose simulators are kept, about 0.5 GB each.

    Raises:
        ValueError: An argument outside of what is allowed.
        MissingExtraError: LIBERO is not installed.
        OSError: MuJoCo finds no OpenGL library.

    Example:
        >>> import gymnasium as gym
        >>> env = gym.make("wmgym:LIBERO-v0", suite="libero_spatial")  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0, options={"task_id": 3})  # doctest: +SKIP
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own annotation of this attribute is a plain dict
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }

    def __init__(
        self,
        *,
        suite: str = "libero_object",
        tasks: Sequence[int] | None = None,
        image_size: int | tuple[int, int] = (128, 128),
        cameras: Sequence[str] = ("agentview",),
        action_chunk: int | None = None,
        split: Split = "all",
        max_steps: int | None = None,
        settle_steps: int = SETTLE_STEPS,
        fast_rendering: bool = False,
        render_mode: str | None = None,
        init_state_transform: InitStateTransform | None = None,
        max_simulators: int = 2,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: allowed are {SPLITS}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r}: allowed are None and 'rgb_array'")
        self.settle_steps = check_integer("settle_steps", settle_steps, 0)
        self._max_simulators = check_integer("max_simulators", max_simulators)
        self.image_size = _image_size(image_size)
        self.observation_space = observation_space(self.image_size, cameras)
        self.cameras = tuple(cameras)
        self.action_space = action_space(action_chunk)
        self.suite, self.split = suite, split
        self.tasks = _task_ids(suite, tasks)
        self.max_steps = _step_limit(suite, max_steps)
        self.metadata = {**self.metadata, "render_fps": CONTROL_HZ / (action_chunk or 1)}
        self.render_mode = render_mode
        self._fast_rendering = fast_rendering
        self.init_state_transform = init_state_transform
        self._simulators: OrderedDict[int, Simulator] = OrderedDict()
        self._episode: dict[str, Any] = {}
        self._frame_index, self._running, self._warned = 0, False, False
        self._image: NDArray[np.uint8] | None = None

    @property
    def simulator(self) -> Simulator:
        """The simulator of the current episode.

        Raises:
            ResetNeeded: Before the first reset, or after one that failed, or after `close`.
        """
        if not self._episode:
            raise ResetNeeded("there is no simulator before the first reset()")
        return self._simulators[self._episode["task_id"]]

    @property
    def instruction(self) -> str:
        """The task of the current episode in words."""
        return self.simulator.instruction

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; what `options` leave open is drawn from the seed.

        Args:
            seed: Seed of the environment's generator; None goes on with the current one.
            options: `task_id`, one of the environment's tasks. `init_state`, the index of a stored
                initial state of the split, or a state `(S,)`. `fixture_seed`, which decides the
                poses of the fixtures.

        Returns:
            Observation and info.

        Raises:
            ValueError: An unknown option, or one outside of what is allowed.
        """
        super().reset(seed=seed)
        self._running, self._episode = False, {}
        request = dict(options or {})
        unknown = sorted(set(request) - set(OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset options {unknown}: allowed are {list(OPTIONS)}")
        # Drawn before the task, so that a seed gives the same ones for any choice of tasks.
        fixture_seed = int(self.np_random.integers(2**31))
        position = self.np_random.random()
        task_id = int(self.np_random.choice(self.tasks))
        if "task_id" in request:
            task_id = _chosen("task_id", request["task_id"], self.tasks)
        stored = initial_states(self.suite, task_id)
        allowed = self._init_state_ids(task_id, len(stored))
        given = request.get("init_state", allowed[int(position * len(allowed))])
        if np.ndim(given) == 0:
            init_state_id = _chosen("init_state", given, allowed)
            state = stored[init_state_id]
        else:
            init_state_id, state = -1, np.asarray(given, np.float64)
        if "fixture_seed" in request:
            fixture_seed = check_integer("options['fixture_seed']", request["fixture_seed"], 0)
        self._start(task_id, state, fixture_seed)
        self._episode = {
            "instruction": self._simulators[task_id].instruction,
            "suite": self.suite,
            "task_id": task_id,
            "init_state_id": init_state_id,
            "episode_id": init_state_id,
            "fixture_seed": fixture_seed,
        }
        self._frame_index = 0
        self._running = True
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Applies an action `(7,)`, or a chunk `(T, 7)` until the episode ends, and renders once.

        Args:
            action: Raw LIBERO actions; values outside [-1, 1] are clipped, with one warning.

        Returns:
            Observation, reward, terminated (solved), truncated (step limit), info.

        Raises:
            ResetNeeded: The episode has ended, or none was started.
            ValueError: Wrong shape, NaN or infinity; the episode goes on.
        """
        if not self._running:
            raise ResetNeeded("no episode is running: call reset() first")
        success = False
        for row in self._checked(action).reshape(-1, ACTION_DIM):
            self.simulator.step(row)
            self._frame_index += 1
            success = self.simulator.success
            if success or self._frame_index >= self.max_steps:
                self._running = False
                break
        truncated = not success and not self._running
        return self._observe(), float(success), success, truncated, self._info()

    def render(self) -> NDArray[np.uint8] | None:
        """The third-person image of the latest observation, `(H, W, 3)`, or None without a mode.

        Raises:
            ResetNeeded: Before the first reset.
        """
        if self.render_mode is None:
            return None
        if self._image is None:
            raise ResetNeeded("there is nothing to render before the first reset()")
        return self._image.copy()

    def close(self) -> None:
        """Frees all simulators; a later `reset` makes them anew."""
        self._running, self._episode, self._image = False, {}, None
        while self._simulators:
            self._simulators.popitem()[1].close()

    def _init_state_ids(self, task_id: int, count: int) -> list[int]:
        held_out = [i for i in range(count) if i in HELD_OUT_INIT_STATES]
        train = [i for i in range(count) if i not in HELD_OUT_INIT_STATES]
        ids = {"all": list(range(count)), "train": train, "held_out": held_out}[self.split]
        if not ids:
            raise ValueError(
                f"split={self.split!r}: {self.suite} task {task_id} stores {count} initial states, "
                "none of them in this split; use split='all'"
            )
        return ids

    def _start(self, task_id: int, state: NDArray[np.float64], fixture_seed: int) -> None:
        if not np.isfinite(state).all():
            raise ValueError("options['init_state'] contains NaN or infinity")
        simulator = self._simulator_of(task_id)
        simulator.place_fixtures(fixture_seed)
        if self.init_state_transform is not None:
            state = self.init_state_transform(simulator, state.copy(), self.np_random)
        simulator.begin(state, self.settle_steps)

    def _simulator_of(self, task_id: int) -> Simulator:
        if task_id not in self._simulators:
            while len(self._simulators) >= self._max_simulators:
                self._simulators.popitem(last=False)[1].close()
            size, fast = self.image_size, self._fast_rendering
            simulator = Simulator(self.suite, task_id, image_size=size, fast_rendering=fast)
            self._simulators[task_id] = simulator
        self._simulators.move_to_end(task_id)
        return self._simulators[task_id]

    def _checked(self, action: Any) -> NDArray[np.float32]:
        clipped = check_actions(action, self.action_space.shape or ())
        largest = np.abs(np.asarray(action)).max()
        if largest > 1.0 and not self._warned:
            self._warned = True
            logger.warn(
                f"actions reach {largest:.3g} in size: values outside [-1, 1] are clipped, as "
                "LIBERO's controller does (this is said once)"
            )
        return clipped

    def _observe(self) -> dict[str, Any]:
        self._image = self.simulator.render("agentview")
        observation = {"image": self._image.copy()}
        if "wrist" in self.cameras:
            observation["wrist_image"] = self.simulator.render("wrist")
        return {**observation, "proprio": self.simulator.proprio()}

    def _info(self) -> dict[str, Any]:
        solved = self.simulator.success
        return {**self._episode, "frame_index": self._frame_index, "success": solved}


def _image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or any(
        not 1 <= n <= largest for n, largest in zip(pair, _LARGEST_IMAGE, strict=True)
    ):
        raise ValueError(
            f"image_size={size!r}: expected pixels or a pair (height, width), from 1 to "
            f"{_LARGEST_IMAGE}, the frame buffer of LIBERO's scenes"
        )
    return int(pair[0]), int(pair[1])


def _task_ids(suite: str, tasks: Sequence[int] | None) -> tuple[int, ...]:
    known = range(n_tasks(suite))
    ids = tuple(known) if tasks is None else check_tasks(tasks)
    if not ids or any(task not in known for task in ids):
        raise ValueError(
            f"tasks={tasks!r}: {suite} has tasks 0...{len(known) - 1}; name one or more"
        )
    return ids


def _extends(suite: str, name: str) -> bool:
    """Whether a suite is the named one or a variant of it, as LIBERO-PRO's `libero_10_swap` is."""
    return suite == name or suite.startswith(f"{name}_")


def _step_limit(suite: str, max_steps: int | None) -> int:
    if max_steps is None:
        limit = next((n for name, n in STEP_LIMITS.items() if _extends(suite, name)), None)
        if limit is None:
            raise ValueError(f"suite={suite!r} has no published step limit: give max_steps")
        return limit
    return check_integer("max_steps", max_steps)


def _chosen(name: str, value: Any, allowed: Collection[int]) -> int:
    if value not in allowed:
        raise ValueError(f"options[{name!r}]={value!r}: allowed are {list(allowed)}")
    return int(value)
