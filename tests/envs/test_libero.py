"""`LIBERO-v0`: Gymnasium's contract, seeds and options, chunks, ends of episodes, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence

from wmgym.envs import simulator
from wmgym.envs.libero import LiberoEnv
from wmgym.envs.simulator import WAIT_ACTION, Simulator, initial_states
from wmgym.experts import ExpertConfig, expert
from wmgym.extras import MissingExtraError
from wmgym.spaces import STEP_LIMITS

needs_libero = pytest.mark.libero


def make(**changes):
    pytest.importorskip("libero", reason="needs the extra `libero`")
    arguments = {"tasks": (0,), "image_size": 84, "settle_steps": 2}
    return LiberoEnv(**(arguments | changes))


@pytest.fixture(scope="module")
def env():
    env = make(tasks=(0, 1), max_simulators=1, render_mode="rgb_array")
    yield env
    env.close()


def random_actions(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7)).astype(np.float32)


def begin(env, **options):
    """A reset to task 0, unless the options say otherwise."""
    return env.reset(seed=0, options={"task_id": 0, **options})


def assert_equal(left, right):
    assert data_equivalence(left, right, exact=True)


# Gymnasium's contract.


@needs_libero
def test_gymnasium_accepts_it():
    env = gym.make("LIBERO-v0", tasks=(0,), image_size=(64, 84), render_mode="rgb_array")
    try:
        assert env.observation_space["image"].shape == (64, 84, 3)
        check_env(env.unwrapped, skip_render_check=True)
        assert env.unwrapped.max_steps == STEP_LIMITS["libero_object"]
        assert env.unwrapped.metadata["render_fps"] == 20
    finally:
        env.close()


@needs_libero
def test_info_describes_the_episode(env):
    observation, info = env.reset(seed=4)
    assert env.observation_space.contains(observation)
    assert env.tasks == (0, 1)
    assert info["task_id"] in env.tasks
    assert info["instruction"] == env.instruction == env.simulator.instruction
    assert info["init_state_id"] == info["episode_id"]
    assert (info["suite"], info["frame_index"], info["success"]) == ("libero_object", 0, False)
    assert env.step(WAIT_ACTION)[4] == {**info, "frame_index": 1}


@needs_libero
def test_images_are_the_simulators_own(env):
    observation, _ = begin(env)
    np.testing.assert_array_equal(observation["image"], env.simulator.render("agentview"))
    np.testing.assert_array_equal(observation["proprio"], env.simulator.proprio())
    shown = env.render()
    np.testing.assert_array_equal(shown, observation["image"])
    shown[:] = 0
    observation["image"][:] = 0
    assert env.render().any()


@needs_libero
def test_second_camera():
    env = make(cameras=("agentview", "wrist"))
    try:
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        np.testing.assert_array_equal(observation["wrist_image"], env.simulator.render("wrist"))
        assert np.abs(observation["wrist_image"] - observation["image"].astype(float)).mean() > 10
        assert env.render() is None  # no render_mode
    finally:
        env.close()


# Seeds and options.


@needs_libero
def test_an_episode_is_a_function_of_its_seed(env):
    def episode(seed):
        rows = [env.reset(seed=seed), *[env.step(action) for action in random_actions(2)]]
        return rows, env.simulator.state()

    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, state = episode(1)
    other, _ = episode(2)
    again, state_again = episode(1)
    assert_equal(first, again)
    np.testing.assert_array_equal(state, state_again)
    keys = ("task_id", "init_state_id", "fixture_seed")
    assert [first[0][1][k] for k in keys] != [other[0][1][k] for k in keys]
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@needs_libero
def test_tasks_are_drawn_and_simulators_bounded(env, monkeypatch):
    closed = []
    close = Simulator.close
    monkeypatch.setattr(Simulator, "close", lambda s: closed.append(s.task_id) or close(s))
    first = begin(env)
    assert begin(env, task_id=1)[1]["instruction"] != first[1]["instruction"]
    assert closed[-1] == 0  # max_simulators=1
    assert_equal(begin(env), first)
    assert closed[-1] == 1
    draws = {int(np.random.default_rng(seed).choice(env.tasks)) for seed in range(20)}
    assert draws == {env.reset(seed=seed)[1]["task_id"] for seed in (0, 1, 2, 3)} == {0, 1}


@needs_libero
@pytest.mark.parametrize(("split", "allowed"), [("train", range(40)), ("held_out", range(40, 50))])
def test_initial_states_come_from_the_split(split, allowed):
    env = make(split=split, settle_steps=0, image_size=16)
    try:
        drawn = {
            env.reset(seed=seed if seed == 0 else None)[1]["init_state_id"] for seed in range(6)
        }
        assert len(drawn) > 2
        assert drawn <= set(allowed)
        outside = 45 if split == "train" else 5
        with pytest.raises(ValueError, match=rf"'init_state'\]={outside}: allowed are"):
            env.reset(options={"init_state": outside})
    finally:
        env.close()


@needs_libero
def test_an_initial_state_by_index_or_in_full(env):
    by_index = begin(env, init_state=7, fixture_seed=3)
    in_full = begin(env, init_state=initial_states("libero_object", 0)[7], fixture_seed=3)
    assert (by_index[1]["init_state_id"], by_index[1]["fixture_seed"]) == (7, 3)
    assert_equal(by_index[0], in_full[0])
    assert in_full[1] == {**by_index[1], "init_state_id": -1, "episode_id": -1}


@needs_libero
def test_the_recorded_fixture_seed_puts_the_fixtures_back():
    env = make(suite="libero_spatial", settle_steps=0)
    try:
        _, info = env.reset(seed=0)
        fixtures = env.simulator.fixtures()
        env.reset(seed=1)
        assert env.simulator.fixtures() != fixtures
        env.reset(seed=1, options={"fixture_seed": info["fixture_seed"]})
        assert env.simulator.fixtures() == fixtures
    finally:
        env.close()


@needs_libero
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": 0}, r"unknown reset options \['task'\].*'task_id', 'init_state'"),
        ({"task_id": 5}, r"'task_id'\]=5: allowed are \[0, 1\]"),
        ({"init_state": 50}, r"'init_state'\]=50: allowed are \[0, 1"),
        ({"init_state": np.zeros(7)}, r"state has shape \(7,\)"),
        ({"init_state": np.full(110, np.nan)}, "contains NaN"),
    ],
)
def test_bad_options_are_refused_and_leave_no_episode(env, options, message):
    begin(env)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options={"task_id": 0, **options})
    with pytest.raises(ResetNeeded):
        env.step(WAIT_ACTION)


def shifted(simulator, state, rng):
    """Moves the soup by up to 2 cm along x."""
    joint = simulator.control_env.env.objects_dict["alphabet_soup_1"].joints[0]
    state[1 + simulator.control_env.sim.model.get_joint_qpos_addr(joint)[0]] += rng.uniform(
        0.01, 0.02
    )
    return state


@needs_libero
def test_initial_states_can_be_perturbed(env):
    begin(env, init_state=0)
    still = env.simulator.object_positions()
    perturbed = make(init_state_transform=shifted)
    try:
        first = begin(perturbed, init_state=0)
        moved = perturbed.simulator.object_positions()
        assert_equal(begin(perturbed, init_state=0), first)
    finally:
        perturbed.close()
    assert 0.008 < moved["alphabet_soup_1"][0] - still["alphabet_soup_1"][0] < 0.022
    np.testing.assert_allclose(moved["basket_1"], still["basket_1"], atol=1e-4)
    stored = initial_states("libero_object", 0)[0]
    begin(env, init_state=0)
    assert_equal(still["alphabet_soup_1"], env.simulator.object_positions()["alphabet_soup_1"])
    assert np.isfinite(stored).all()


# Actions, chunks and ends.


@needs_libero
def test_a_chunk_is_its_actions_one_by_one_with_one_picture(env, monkeypatch):
    actions = random_actions(5)
    begin(env)
    for action in actions:
        single = env.step(action)
    state = env.simulator.state()
    chunked = make(action_chunk=5)
    try:
        assert chunked.action_space.shape == (5, 7)
        assert chunked.metadata["render_fps"] == 4
        begin(chunked)
        pictures = []
        render = Simulator.render
        monkeypatch.setattr(
            Simulator, "render", lambda s, *args: pictures.append(args) or render(s, *args)
        )
        row = chunked.step(actions)
        np.testing.assert_array_equal(chunked.simulator.state(), state)
    finally:
        chunked.close()
    assert pictures == [("agentview",)]
    assert_equal(row[0], single[0])
    assert row[4]["frame_index"] == single[4]["frame_index"] == 5


@needs_libero
def test_the_step_limit_truncates_inside_a_chunk():
    env = make(action_chunk=4, max_steps=5)
    try:
        env.reset(seed=0)
        ends = [env.step(np.tile(WAIT_ACTION, (4, 1)))[1:] for _ in range(2)]
        assert [end[:3] for end in ends] == [(0.0, False, False), (0.0, False, True)]
        assert [end[3]["frame_index"] for end in ends] == [4, 5]
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            env.step(np.tile(WAIT_ACTION, (4, 1)))
    finally:
        env.close()


@needs_libero
def test_success_terminates_inside_a_chunk():
    env = make(action_chunk=32, settle_steps=10)
    try:
        begin(env, init_state=0, fixture_seed=0)
        actor = expert(env.simulator.control_env, np.random.default_rng(0), ExpertConfig())
        actions = []
        for action in actor:
            actions.append(action)
            env.simulator.step(action)
            if env.simulator.success:
                break
        assert env.simulator.success
        steps = len(actions)
        actions.extend([WAIT_ACTION] * 32)
        begin(env, init_state=0, fixture_seed=0)
        for chunk in range(steps // 32 + 1):
            row = env.step(np.array(actions[32 * chunk : 32 * (chunk + 1)]))
            if row[2]:
                break
            assert row[1:4] == (0.0, False, False)
        assert row[1:4] == (1.0, True, False)
        assert (row[4]["frame_index"], row[4]["success"]) == (steps, True)
        with pytest.raises(ResetNeeded):
            env.step(np.array(actions[:32]))
    finally:
        env.close()


@needs_libero
def test_bad_actions_are_refused_and_large_ones_clipped_with_one_warning(env):
    begin(env)
    large = np.array([3, -2, 0, 0, 0, 0, 1], np.float32)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), expected \(7,\)"):
        env.step(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"NaN or infinity, first at index \[2\]"):
        env.step(np.array([0, 0, np.nan, 0, 0, 0, 0]))
    with pytest.warns(UserWarning, match="reach 3 in size"):
        env.step(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(large)
    state = env.simulator.state()
    begin(env)
    env.step(np.clip(large, -1, 1))
    env.step(np.clip(large, -1, 1))
    np.testing.assert_array_equal(env.simulator.state(), state)


@needs_libero
def test_close_and_begin_again():
    env = make(render_mode="rgb_array")
    for call in (env.render, lambda: env.step(WAIT_ACTION), lambda: env.simulator):
        with pytest.raises(ResetNeeded, match=r"reset\(\)"):
            call()
    first = env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step(WAIT_ACTION)
    assert_equal(env.reset(seed=0), first)
    env.close()


# Vectors of environments.


@needs_libero
def test_processes_give_what_one_process_gives():
    pytest.importorskip("libero", reason="needs the extra `libero`")
    actions = random_actions(2).reshape(1, 2, 7)

    def episode(mode, **vector_kwargs):
        envs = gym.make_vec(
            "LIBERO-v0",
            num_envs=2,
            vectorization_mode=mode,
            vector_kwargs=vector_kwargs,
            tasks=(0,),
            image_size=32,
            settle_steps=1,
        )
        try:
            return [envs.reset(seed=[3, 4]), *[envs.step(action) for action in actions]]
        finally:
            envs.close()

    together, apart = episode("sync"), episode("async", context="spawn")
    assert_equal([row[0] for row in together], [row[0] for row in apart])
    for mine, theirs in zip(together, apart, strict=True):
        for key in ("init_state_id", "fixture_seed", "frame_index", "instruction", "success"):
            np.testing.assert_array_equal(mine[-1][key], theirs[-1][key])
    assert (together[1][0]["image"][0] != together[1][0]["image"][1]).any()


# Construction.


@needs_libero
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_nowhere"}, "suite='libero_nowhere' is unknown"),
        ({"suite": "libero_object_swap"}, "no published step limit: give max_steps"),
        ({"tasks": (10,)}, r"tasks=\(10,\): libero_object has tasks 0\.\.\.9"),
        ({"tasks": ()}, r"tasks=\(\)"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (481, 84)}, r"from 1 to \(480, 640\)"),
        ({"cameras": ("wrist",)}, "cameras="),
        ({"action_chunk": 0}, "action_chunk=0"),
        ({"split": "test"}, r"split='test': allowed are \('all', 'train', 'held_out'\)"),
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
    assert "RuntimeError: MuJoCo found no OpenGL library with MUJOCO_GL='osmesa'" in done.stderr
    assert "libosmesa6" in done.stderr
