"""One LIBERO task in MuJoCo, behind the few calls the rest of wmgym needs.

`Simulator` wraps LIBERO's own environment and changes none of its physics, but owns everything
around it: initial states and settling, fixture poses (which LIBERO draws from NumPy's global
generator and does not store in its states), the controller's goal across resets, and rendering,
which is 85 % of the cost and therefore happens only when a picture is asked for.

Images are turned by 180 degrees as in the modified LIBERO RLDS data; states are MuJoCo's
`[time, qpos, qvel]` in float64.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmgym.envs.mesh_simplification import simplified_meshes
from wmgym.extras import MissingExtraError, require
from wmgym.spaces import ACTION_DIM, axis_angle

SETTLE_STEPS = 10
"""Control steps before an episode starts: the stored states hold objects in the air."""

WAIT_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
"""Action that keeps the arm where it is with the gripper open."""

_FAST_MESH_GRID = 0.006
_MAX_PLACEMENTS = 20
_CAMERA_NAMES = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}

Fixtures = dict[str, list[float]]
"""Pose of each fixture by name: position (3, m) followed by quaternion (4, wxyz)."""


@contextlib.contextmanager
def _explained_gl_errors() -> Iterator[None]:
    """PyOpenGL says `'NoneType' object has no attribute 'glGetError'` for a missing library."""
    try:
        yield
    except MissingExtraError:
        raise
    except (AttributeError, ImportError) as error:
        if "gl" not in str(error).lower():
            raise
        raise OSError(
            f"MuJoCo found no OpenGL library with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} "
            f"({error}). Install one, e.g. apt-get install libosmesa6 libgl1, or set MUJOCO_GL=egl "
            "(apt package libegl1, or a GPU driver) before Python starts"
        ) from error


@cache
@_explained_gl_errors()
def _benchmark(suite: str) -> Any:
    os.environ.setdefault("MUJOCO_GL", "osmesa" if sys.platform == "linux" else "")
    with contextlib.redirect_stdout(io.StringIO()):
        benchmark = require("libero.libero.benchmark", "libero")
        try:
            return benchmark.get_benchmark(suite)(task_order_index=0)
        except KeyError:
            raise ValueError(
                f"suite={suite!r} is unknown to the installed LIBERO; known are "
                f"{sorted(benchmark.get_benchmark_dict())}"
            ) from None


def n_tasks(suite: str) -> int:
    """Number of tasks of a suite."""
    return int(_benchmark(suite).n_tasks)


def instruction(suite: str, task_id: int) -> str:
    """A task in words."""
    return str(_benchmark(suite).get_task(task_id).language)


@cache
def initial_states(suite: str, task_id: int) -> NDArray[np.float64]:
    """LIBERO's stored initial states of a task, `(n, S)`."""
    with contextlib.redirect_stdout(io.StringIO()):
        return np.asarray(_benchmark(suite).get_task_init_states(task_id), np.float64)


def gripper_command_after(actions: NDArray) -> float:
    """`Simulator.gripper_command` after an episode's first actions `(t, 7)`.

    An episode begins with the fingers sent open; robosuite then moves the command by 0.01 in each
    of 25 substeps of an action, towards closed or open by the sign of its last entry.
    """
    command = -1.0
    for direction in np.sign(np.asarray(actions)[..., -1]):
        command = min(1.0, max(-1.0, command + 0.25 * float(direction)))
    return command


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO places fixtures with NumPy's global generator: seed it here, and put it back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _free_renderer(renderer: Any) -> None:
    """Frees a renderer's GL objects in its own context: elsewhere, it would free another's."""
    if renderer._gl_context is not None:
        renderer._gl_context.make_current()
    renderer.close()


class Simulator:
    """One LIBERO task.

    Args:
        suite: LIBERO suite, e.g. `"libero_object"`.
        task_id: Index of the task in the suite.
        image_size: `(H, W)` of rendered images in pixels.
        fast_rendering: Draw meshes simplified on a 6 mm grid and no mirror images: two to four
            times faster in software, and at 128 px 1-3 grey levels from LIBERO's own pictures on
            average. Physics never changes. Train and evaluate with the same setting.

    Raises:
        ValueError: Unknown suite or task.
        MissingExtraError: LIBERO is not installed.
    """

    @_explained_gl_errors()
    def __init__(
        self,
        suite: str,
        task_id: int,
        *,
        image_size: tuple[int, int] = (128, 128),
        fast_rendering: bool = False,
    ) -> None:
        benchmark = _benchmark(suite)
        if not 0 <= task_id < benchmark.n_tasks:
            raise ValueError(f"task_id={task_id}: {suite} has tasks 0...{benchmark.n_tasks - 1}")
        self.suite, self.task_id, self.image_size = suite, task_id, image_size
        self.fast_rendering = fast_rendering
        task = benchmark.get_task(task_id)
        self.instruction = instruction(suite, task_id)
        libero = require("libero.libero", "libero")
        wrapper = require("libero.libero.envs.env_wrapper", "libero")
        bddl = Path(libero.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        with contextlib.redirect_stdout(io.StringIO()), _global_numpy_seed(0):
            self.control_env = wrapper.ControlEnv(
                bddl_file_name=str(bddl),
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,
                ignore_done=True,
            )
        # Nothing here reads robosuite's observables, which cost a third of a physics step.
        self._env._observables = {}
        self._renderer: Any = None

    @property
    def _env(self) -> Any:
        return self.control_env.env

    @property
    def model(self) -> Any:
        """The `mujoco.MjModel`."""
        return self._env.sim.model._model

    @property
    def data(self) -> Any:
        """The `mujoco.MjData`."""
        return self._env.sim.data._data

    def reset(
        self, init_state: NDArray[np.float64], *, seed: int, settle_steps: int = SETTLE_STEPS
    ) -> None:
        """Puts the scene into a stored initial state and lets it settle.

        Args:
            init_state: `(S,)` state `[time, qpos, qvel]`.
            seed: Decides the poses of the fixtures, which are not part of the state.
            settle_steps: Control steps without motion before the episode starts.

        Raises:
            ValueError: The state has the wrong length for this task.
            RuntimeError: LIBERO found no collision-free placement.
        """
        self.place_fixtures(seed)
        self.begin(init_state, settle_steps)

    def place_fixtures(self, seed: int) -> None:
        """Draws the poses of the fixtures, as `reset` does; what else is in the scene is undefined.

        Raises:
            RuntimeError: LIBERO found no collision-free placement.
        """
        errors = require("robosuite.utils.errors", "libero")
        with _global_numpy_seed(seed):
            for _ in range(_MAX_PLACEMENTS):
                try:
                    self._env.reset()
                    return
                except errors.RandomizationError:
                    continue
        raise RuntimeError(
            f"{self.suite} task {self.task_id}: no valid object placement in "
            f"{_MAX_PLACEMENTS} tries with seed {seed}; try another seed"
        )

    def begin(self, init_state: NDArray[np.float64], settle_steps: int = SETTLE_STEPS) -> None:
        """Puts the scene into an initial state, under the fixtures that are there, and settles.

        Raises:
            ValueError: The state has the wrong length for this task.
        """
        self._put(init_state)
        self.gripper_command = 0.0
        for _ in range(settle_steps):
            self.step(WAIT_ACTION)

    def step(self, action: NDArray) -> None:
        """Applies one raw action `(7,)` for 1/20 s."""
        if np.shape(action) != (ACTION_DIM,):
            raise ValueError(f"action has shape {np.shape(action)}, expected ({ACTION_DIM},)")
        self._env.done = False
        self._env.step(np.asarray(action, np.float64))

    @property
    def success(self) -> bool:
        """LIBERO's own success check, now."""
        return bool(self._env._check_success())

    def proprio(self) -> NDArray[np.float32]:
        """End-effector position, axis-angle orientation, gripper joint positions: `(8,)`."""
        transforms = require("robosuite.utils.transform_utils", "libero")
        self._sync()
        robot = self._env.robots[0]
        data = self._env.sim.data
        position = data.site_xpos[robot.eef_site_id]
        quaternion = transforms.convert_quat(
            data.get_body_xquat(robot.robot_model.eef_name), to="xyzw"
        )
        gripper = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, axis_angle(quaternion), gripper]).astype(np.float32)

    def state(self) -> NDArray[np.float64]:
        """Flattened MuJoCo state `[time, qpos, qvel]`."""
        return np.asarray(self._env.sim.get_state().flatten(), np.float64)

    @property
    def gripper_command(self) -> float:
        """Where robosuite is sending the fingers: -1 open ... 1 closed.

        An action moves it by at most 0.25, so it remembers the last eight. It is not part of
        MuJoCo's state; see `gripper_command_after`.
        """
        return float(self._env.robots[0].gripper.current_action[-1])

    @gripper_command.setter
    def gripper_command(self, command: float) -> None:
        self._env.robots[0].gripper.current_action = np.array([-command, command])

    def set_state(
        self,
        state: NDArray[np.float64],
        fixtures: Fixtures | None = None,
        gripper_command: float | None = None,
    ) -> None:
        """Restores a state; what happens from there depends on nothing that was before.

        Args:
            state: `(S,)` state `[time, qpos, qvel]`.
            fixtures: Poses of the fixtures; None leaves them where they are.
            gripper_command: Where the fingers are being sent; None leaves it as it is.

        Raises:
            ValueError: The state has the wrong length for this task.
        """
        for name, pose in (fixtures or {}).items():
            body = self._fixture_body(name)
            self.model.body_pos[body], self.model.body_quat[body] = pose[:3], pose[3:]
        if gripper_command is not None:
            self.gripper_command = gripper_command
        self._put(state)

    def _put(self, state: NDArray[np.float64]) -> None:
        expected = 1 + self.model.nq + self.model.nv
        if np.shape(state) != (expected,):
            raise ValueError(
                f"state has shape {np.shape(state)}, {self.suite} task {self.task_id} "
                f"needs ({expected},)"
            )
        self.data.qacc_warmstart[:] = 0
        self._env.sim.set_state_from_flattened(np.asarray(state, np.float64))
        self._env.sim.forward()
        self._env._check_success()
        self._env._post_process()
        self._env.timestep = 0
        for robot in self._env.robots:
            robot.controller.update(force=True)
            robot.controller.reset_goal()

    def fixtures(self) -> Fixtures:
        """Poses of the fixtures, which `state` does not contain."""
        poses = {}
        for name in self._env.fixtures_dict:
            body = self._fixture_body(name)
            poses[name] = [
                *self.model.body_pos[body].tolist(),
                *self.model.body_quat[body].tolist(),
            ]
        return poses

    def move_fixture(self, name: str, offset: NDArray[np.float64]) -> None:
        """Moves a fixture by `offset` `(3,)` metres, until fixtures are placed anew."""
        self.model.body_pos[self._fixture_body(name)] += offset

    def _fixture_body(self, name: str) -> int:
        return int(self._env.sim.model.body_name2id(self._env.fixtures_dict[name].root_body))

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the movable objects."""
        return tuple(self._env.objects_dict)

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the movable objects and of the fixtures."""
        return (*self._env.objects_dict, *self._env.fixtures_dict)

    def goal(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the task moves, and where to: names of objects and fixtures, in the task's order."""
        parts: tuple[list[str], list[str]] = ([], [])
        for _, *arguments in self._env.parsed_problem["goal_state"]:
            for part, argument in zip(parts, arguments, strict=False):
                part.extend(name for name in self.things if argument.startswith(name))
        moved, places = (tuple(dict.fromkeys(part)) for part in parts)
        return moved, places

    def joint_columns(self, name: str) -> slice:
        """Where the position (3, m) and quaternion (4) of a movable object are in a state."""
        joint = self._env.objects_dict[name].joints[0]
        first = 1 + int(self._env.sim.model.get_joint_qpos_addr(joint)[0])
        return slice(first, first + 7)

    def contacts(self) -> set[frozenset[str]]:
        """Pairs of objects and fixtures that touch now, by name."""
        model = self._env.sim.model
        things = {**self._env.objects_dict, **self._env.fixtures_dict}
        names = {int(model.body_name2id(o.root_body)): n for n, o in things.items()}
        pairs = set()
        for contact in self.data.contact:
            found = set()
            for geom in (contact.geom1, contact.geom2):
                body = int(self.model.geom_bodyid[geom])
                while body and body not in names:
                    body = int(self.model.body_parentid[body])
                if body:
                    found.add(names[body])
            if len(found) == 2:
                pairs.add(frozenset(found))
        return pairs

    def object_positions(self) -> dict[str, NDArray[np.float64]]:
        """World position `(3,)` in metres of every movable object, by name."""
        ids = self._env.obj_body_id
        return {name: self.data.xpos[ids[name]].copy() for name in self._env.objects_dict}

    def render(self, camera: str = "agentview") -> NDArray[np.uint8]:
        """The picture `(H, W, 3)` of a camera ("agentview" or "wrist"), turned by 180 degrees."""
        mujoco = require("mujoco", "libero")
        if self._renderer is None:
            options = mujoco.MjvOption()
            options.geomgroup[0] = 0  # collision shapes
            with simplified_meshes(self.model, _FAST_MESH_GRID if self.fast_rendering else 0.0):
                self._renderer = mujoco.Renderer(self.model, *self.image_size)
            if self.fast_rendering:
                self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._options = options
            self._free_renderer = weakref.finalize(self, _free_renderer, self._renderer)
        self._sync()
        self._renderer.update_scene(self.data, _CAMERA_NAMES[camera], self._options)
        return self._renderer.render()[:, ::-1].copy()

    def _sync(self) -> None:
        """Brings positions of bodies and sites up to date with the joints.

        MuJoCo leaves them one substep (2 ms) behind after a step, and LIBERO's own observations
        show that. Here an observation is a function of the state alone, and a replayed state gives
        the recorded one. Dynamics don't see the difference: they start from the joints.
        """
        mujoco = require("mujoco", "libero")
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def close(self) -> None:
        """Frees the renderer and the simulation."""
        if self._renderer is not None:
            self._free_renderer()
            self._renderer = None
        self.control_env.close()
