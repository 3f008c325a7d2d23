"""The simulator against LIBERO's own environment, and what it promises on top of it."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wmgym.envs.simulator import (
    WAIT_ACTION,
    Simulator,
    gripper_command_after,
    initial_states,
    n_tasks,
)
from wmgym.spaces import axis_angle

pytestmark = pytest.mark.libero

SUITE, TASK, SIZE, SEED, SETTLE = "libero_spatial", 0, 84, 5, 4


def random_actions(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def init_states():
    pytest.importorskip("libero", reason="needs the extra `libero`")
    return initial_states(SUITE, TASK)


@pytest.fixture(scope="module")
def libero(init_states):
    """What LIBERO's own environment gives; it frees its renderer before the simulator makes one."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    task = benchmark.get_benchmark(SUITE)(task_order_index=0).get_task(TASK)
    bddl = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    before = np.random.get_state()  # noqa: NPY002
    env = OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=SIZE, camera_widths=SIZE)
    env.seed(SEED)
    env.reset()
    np.random.set_state(before)  # noqa: NPY002
    env.set_init_state(init_states[3])
    controller = env.robots[0].controller
    controller.update(force=True)
    controller.reset_goal()
    states = []
    for action in [*[WAIT_ACTION] * SETTLE, *random_actions(5)]:
        env.step(action)
        states.append(env.get_sim_state())
    env.sim.forward()
    observation = env.env._get_observations(force_update=True)
    body = env.sim.model.body_name2id(env.env.fixtures_dict["flat_stove_1"].root_body)
    stove = env.sim.model.body_pos[body].copy()
    env.close()
    del env, controller
    gc.collect()
    return SimpleNamespace(states=np.array(states[SETTLE - 1 :]), last=observation, stove=stove)


@pytest.fixture(scope="module")
def simulator(libero):
    simulator = Simulator(SUITE, TASK, image_size=(SIZE, SIZE))
    yield simulator
    simulator.close()


@pytest.fixture
def start(simulator, init_states):
    simulator.reset(init_states[3], seed=SEED, settle_steps=SETTLE)
    return simulator


def roll(simulator, actions):
    states = [simulator.state()]
    for action in actions:
        simulator.step(action)
        states.append(simulator.state())
    return np.array(states)


def test_states_and_pictures_equal_those_of_libero(libero, start):
    np.testing.assert_array_equal(roll(start, random_actions(5)), libero.states)
    np.testing.assert_array_equal(start.fixtures()["flat_stove_1"][:3], libero.stove)
    for camera, key in (("agentview", "agentview"), ("wrist", "robot0_eye_in_hand")):
        turned = libero.last[f"{key}_image"][::-1, ::-1]
        np.testing.assert_array_equal(start.render(camera), turned)
    proprio = np.concatenate(
        [
            libero.last["robot0_eef_pos"],
            axis_angle(libero.last["robot0_eef_quat"]),
            libero.last["robot0_gripper_qpos"],
        ]
    )
    np.testing.assert_allclose(start.proprio(), proprio, atol=1e-6)


def test_a_reset_depends_on_nothing_that_was_before(simulator, init_states):
    runs = []
    for before in (-1, 1):  # the other episode, and where it left the arm and the fingers
        simulator.reset(init_states[8 + before], seed=8 + before, settle_steps=0)
        roll(simulator, np.full((6, 7), before))
        simulator.reset(init_states[3], seed=2, settle_steps=SETTLE)
        runs.append(roll(simulator, random_actions(3, seed=1)))
    np.testing.assert_array_equal(*runs)


def test_looking_does_not_change_the_physics(start):
    state = start.state()
    runs = []
    for looks in (False, True):
        start.set_state(state, gripper_command=-1.0)
        runs.append([])
        for action in random_actions(3):
            start.step(action)
            runs[-1].append(start.state())
            if looks:
                start.render()
                start.proprio()
    np.testing.assert_array_equal(*runs)


def test_fixtures_are_placed_by_the_seed_alone(simulator, init_states):
    def fixtures(state, seed):
        simulator.reset(init_states[state], seed=seed, settle_steps=0)
        return simulator.fixtures()

    first = fixtures(3, seed=1)
    assert set(first) == {"wooden_cabinet_1", "flat_stove_1"}
    assert fixtures(4, seed=1) == first
    other = fixtures(3, seed=2)
    assert all(other[name] != pose for name, pose in first.items())


def test_state_and_fixtures_restore_the_picture(simulator, init_states):
    simulator.reset(init_states[3], seed=1, settle_steps=0)
    roll(simulator, random_actions(2))
    state, fixtures, picture = simulator.state(), simulator.fixtures(), simulator.render()
    simulator.reset(init_states[8], seed=2, settle_steps=0)
    simulator.set_state(state)
    assert not np.array_equal(simulator.render(), picture)  # the cabinet is elsewhere
    simulator.set_state(state, fixtures)
    np.testing.assert_array_equal(simulator.render(), picture)
    np.testing.assert_array_equal(simulator.state(), state)


def test_objects_have_settled(simulator, init_states):
    def heights(steps):
        simulator.reset(init_states[3], seed=SEED, settle_steps=steps)
        bowl = simulator.object_positions()["akita_black_bowl_1"]
        return bowl[2], np.abs(simulator.data.qvel).max()

    dropped, _ = heights(0)
    settled, speed = heights(10)
    assert dropped - settled > 0.01
    assert speed < 0.2


def test_a_restored_arm_does_not_follow_the_previous_goal(start):
    state, before = start.state(), start.proprio()
    turn = np.array([0, 0, 0, 1, 1, 1, -1], np.float32)
    roll(start, [turn] * 6)
    assert np.abs(start.proprio() - before)[3:6].max() > 0.1
    start.set_state(state, gripper_command=-1.0)
    roll(start, [WAIT_ACTION] * 4)
    np.testing.assert_allclose(start.proprio()[:6], before[:6], atol=5e-3)


def test_the_gripper_command_follows_from_the_actions(start):
    actions = random_actions(9, seed=3)
    start.gripper_command = -1.0
    for t, action in enumerate(actions):
        assert start.gripper_command == pytest.approx(gripper_command_after(actions[:t]), abs=1e-9)
        start.step(action)


def test_fast_rendering_changes_little_and_only_pictures(start, init_states):
    actions = random_actions(2)
    fast = Simulator(SUITE, TASK, image_size=(SIZE, SIZE), fast_rendering=True)
    try:
        fast.reset(init_states[3], seed=SEED, settle_steps=SETTLE)
        for camera in ("agentview", "wrist"):
            pair = [s.render(camera).astype(float) for s in (start, fast)]
            assert 0 < np.abs(pair[0] - pair[1]).mean() < 4
        np.testing.assert_array_equal(fast.model.mesh_vert, start.model.mesh_vert)
        np.testing.assert_array_equal(fast.model.mesh_face, start.model.mesh_face)
        np.testing.assert_array_equal(roll(fast, actions), roll(start, actions))
        picture = start.render()
    finally:
        fast.close()
    np.testing.assert_array_equal(start.render(), picture)  # the other's renderer was freed alone


def test_the_global_generator_is_left_alone(simulator, init_states):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    simulator.reset(init_states[3], seed=1, settle_steps=0)
    roll(simulator, random_actions(1))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_wrong_input_is_refused(simulator, init_states):
    with pytest.raises(ValueError, match=r"suite='libero_nowhere' is unknown.*libero_object"):
        n_tasks("libero_nowhere")
    with pytest.raises(ValueError, match=r"task_id=10: libero_spatial has tasks 0\.\.\.9"):
        Simulator(SUITE, 10)
    with pytest.raises(ValueError, match=r"state has shape \(5,\).*needs \(92,\)"):
        simulator.set_state(np.zeros(5))
    with pytest.raises(ValueError, match=r"action has shape \(8, 7\)"):
        simulator.step(np.zeros((8, 7)))
