"""`LIBERO-v0` around the simulator: draws, caches, limits, and what it says to wrong input."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from wmgym.envs import libero, simulator
from wmgym.envs.libero import LiberoEnv
from wmgym.envs.simulator import WAIT_ACTION
from wmgym.extras import MissingExtraError

needs_libero = pytest.mark.libero


def make(**changes):
    pytest.importorskip("libero", reason="needs the extra `libero`")
    arguments = {"tasks": (0,), "image_size": 84, "settle_steps": 5}
    return LiberoEnv(**(arguments | changes))


class NoPhysics:
    """Stands in for the simulator where only the bookkeeping around it matters."""

    instruction, success = "do nothing", False

    def __init__(self, suite, task_id, *, image_size, fast_rendering):
        self.task_id, self.image_size, self.steps, self.open = task_id, image_size, 0, True

    def place_fixtures(self, seed):
        pass

    def begin(self, state, settle_steps):
        self.steps = 0

    def step(self, action):
        self.steps += 1

    def render(self, camera):
        return np.zeros((*self.image_size, 3), np.uint8)

    def proprio(self):
        return np.zeros(8, np.float32)

    def close(self):
        self.open = False


@pytest.fixture
def no_physics(monkeypatch):
    monkeypatch.setattr(libero, "Simulator", NoPhysics)


@needs_libero
def test_the_simulators_of_the_latest_tasks_are_kept(no_physics):
    env = make(tasks=(0, 1, 2), max_simulators=2)
    used = [env.reset(options={"task_id": task}) and env.simulator for task in (0, 1, 0, 2, 0, 1)]
    assert used[0] is used[2] is used[4]
    assert used[5] is not used[1]
    assert [simulator.open for simulator in used] == [True, False, True, False, True, True]
    env.close()
    assert not any(simulator.open for simulator in used)


@needs_libero
@pytest.mark.parametrize(("suite", "limit"), [("libero_object_swap", 280), ("libero_10_lan", 520)])
def test_suites_of_libero_pro_have_the_limits_of_those_they_vary(suite, limit, no_physics):
    assert make(suite=suite).max_steps == limit


@needs_libero
@pytest.mark.parametrize(
    ("split", "allowed"), [("all", range(50)), ("train", range(40)), ("held_out", range(40, 50))]
)
def test_tasks_and_initial_states_are_drawn_from_what_is_allowed(split, allowed, no_physics):
    env, one_task = make(tasks=(1, 3), split=split), make(tasks=(1,), split=split)
    draws = [env.reset(seed=0)[1], *[env.reset()[1] for _ in range(400)]]
    assert {draw["task_id"] for draw in draws} == {1, 3}
    assert {draw["init_state_id"] for draw in draws} == set(allowed)
    assert len({draw["fixture_seed"] for draw in draws}) == len(draws)
    for key in ("init_state_id", "fixture_seed"):  # whatever the tasks
        assert one_task.reset(seed=0)[1][key] == draws[0][key]
    for outside in {0, 45, 50} - set(allowed):
        with pytest.raises(ValueError, match=rf"'init_state'\]={outside}: allowed are"):
            env.reset(options={"init_state": outside})


@needs_libero
def test_the_step_limit_truncates_inside_a_chunk(no_physics):
    env = make(action_chunk=4, max_steps=5)
    chunk = np.tile(WAIT_ACTION, (4, 1))
    env.reset(seed=0)
    ends = [env.step(chunk)[1:] for _ in range(2)]
    assert [end[:3] for end in ends] == [(0.0, False, False), (0.0, False, True)]
    assert [end[3]["frame_index"] for end in ends] == [4, 5]
    assert env.simulator.steps == 5
    with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
        env.step(chunk)
    env.reset()
    assert not env.step(chunk)[3]


@needs_libero
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": 0}, r"unknown reset options \['task'\].*'task_id', 'init_state'"),
        ({"task_id": 5}, r"'task_id'\]=5: allowed are \[0, 1\]"),
        ({"init_state": 50}, r"'init_state'\]=50: allowed are \[0, 1"),
        ({"init_state": np.full(110, np.nan)}, "contains NaN"),
        ({"fixture_seed": "x"}, r"'fixture_seed'\]='x': expected an integer"),
    ],
)
def test_bad_options_are_refused_and_leave_no_episode(options, message, no_physics):
    env = make(tasks=(0, 1))
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    for call in (lambda: env.step(WAIT_ACTION), lambda: env.simulator):
        with pytest.raises(ResetNeeded):
            call()


@needs_libero
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_nowhere"}, "suite='libero_nowhere' is unknown"),
        ({"tasks": (10,)}, r"tasks=\(10,\): libero_object has tasks 0\.\.\.9"),
        ({"tasks": ()}, r"tasks=\(\)"),
        ({"tasks": 3}, "tasks=3: expected a list of task ids"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (481, 84)}, r"from 1 to \(480, 640\)"),
        ({"cameras": ("wrist",)}, "cameras="),
        ({"cameras": "agentview"}, "cameras='agentview': allowed are"),
        ({"action_chunk": 0}, "action_chunk=0"),
        ({"split": "test"}, r"split='test': allowed are \('train', 'held_out', 'all'\)"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"settle_steps": -1}, "settle_steps=-1"),
        ({"max_simulators": 0}, "max_simulators=0"),
        ({"render_mode": "human"}, "render_mode='human'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_without_libero_the_extra_is_named(monkeypatch):
    simulator._benchmark.cache_clear()
    monkeypatch.setitem(sys.modules, "libero.libero.benchmark", None)
    monkeypatch.setitem(sys.modules, "libero", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'wmgym\[libero\]'"):
        LiberoEnv()


WITHOUT_GL = """
import ctypes, ctypes.util
find, load = ctypes.util.find_library, ctypes.CDLL.__init__
def refuse(self, name, *args, **kwargs):
    if "OSMesa" in str(name):
        raise OSError(name)
    return load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = refuse
ctypes.util.find_library = lambda name: None if name == "OSMesa" else find(name)
from wmgym.envs.libero import LiberoEnv
LiberoEnv(tasks=(0,)).reset()
"""


@needs_libero
def test_without_opengl_the_system_package_is_named():
    pytest.importorskip("libero", reason="needs the extra `libero`")
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}
    environment.pop("PYOPENGL_PLATFORM", None)
    command = [sys.executable, "-c", WITHOUT_GL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError: MuJoCo found no OpenGL library with MUJOCO_GL='osmesa'" in done.stderr
    assert "libosmesa6" in done.stderr
