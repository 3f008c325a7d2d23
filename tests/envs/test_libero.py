"""`LIBERO-v0` on the simulator: Gymnasium's contract, seeds, chunks, success, vectors."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence

from wmgym.envs.libero import LiberoEnv
from wmgym.envs.simulator import WAIT_ACTION, Simulator, initial_states
from wmgym.experts import Expert
from wmgym.spaces import STEP_LIMITS

needs_libero = pytest.mark.libero


def make(**changes):
    pytest.importorskip("libero", reason="needs the extra `libero`")
    arguments = {"tasks": (0,), "image_size": 84, "settle_steps": 5}
    return LiberoEnv(**(arguments | changes))


@pytest.fixture(scope="module")
def env():
    env = make(tasks=(0, 1), render_mode="rgb_array")
    yield env
    env.close()


@pytest.fixture(scope="module")
def chunked():
    env = make(action_chunk=8)
    yield env
    env.close()


@pytest.fixture(scope="module")
def spatial():
    env = make(suite="libero_spatial", cameras=("agentview", "wrist"), settle_steps=0)
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
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is")
def test_gymnasium_accepts_it():
    pytest.importorskip("libero", reason="needs the extra `libero`")
    env = gym.make("LIBERO-v0", tasks=(0,), image_size=(64, 84), settle_steps=0)
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
def test_second_camera(spatial):
    observation, _ = spatial.reset(seed=0)
    assert spatial.observation_space.contains(observation)
    np.testing.assert_array_equal(observation["wrist_image"], spatial.simulator.render("wrist"))
    assert np.abs(observation["wrist_image"] - observation["image"].astype(float)).mean() > 10
    assert spatial.render() is None  # no render_mode


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
def test_an_initial_state_by_index_or_in_full(env):
    by_index = begin(env, init_state=7, fixture_seed=3)
    in_full = begin(env, init_state=initial_states("libero_object", 0)[7], fixture_seed=3)
    assert (by_index[1]["init_state_id"], by_index[1]["fixture_seed"]) == (7, 3)
    assert_equal(by_index[0], in_full[0])
    assert in_full[1] == {**by_index[1], "init_state_id": -1, "episode_id": -1}


@needs_libero
def test_the_recorded_fixture_seed_puts_the_fixtures_back(spatial):
    _, info = spatial.reset(seed=0)
    fixtures = spatial.simulator.fixtures()
    spatial.reset(seed=1)
    assert spatial.simulator.fixtures() != fixtures
    spatial.reset(seed=1, options={"fixture_seed": info["fixture_seed"]})
    assert spatial.simulator.fixtures() == fixtures


def shifted(simulator, state, rng):
    """Moves the soup by 1-2 cm along x."""
    joint = simulator.control_env.env.objects_dict["alphabet_soup_1"].joints[0]
    address = simulator.control_env.sim.model.get_joint_qpos_addr(joint)[0]
    state[1 + address] += rng.uniform(0.01, 0.02)
    return state


@needs_libero
def test_initial_states_can_be_perturbed(env, monkeypatch):
    stored = initial_states("libero_object", 0).copy()
    begin(env, init_state=0)
    still = env.simulator.object_positions()
    monkeypatch.setattr(env, "init_state_transform", shifted)
    first = begin(env, init_state=0)
    moved = env.simulator.object_positions()
    assert 0.008 < moved["alphabet_soup_1"][0] - still["alphabet_soup_1"][0] < 0.022
    np.testing.assert_allclose(moved["basket_1"], still["basket_1"], atol=1e-4)
    assert_equal(begin(env, init_state=0), first)
    np.testing.assert_array_equal(initial_states("libero_object", 0), stored)


# Actions, chunks and ends.


@needs_libero
def test_a_chunk_is_its_actions_one_by_one_with_one_picture(env, chunked, monkeypatch):
    actions = random_actions(8)
    begin(env)
    for action in actions:
        single = env.step(action)
    assert chunked.action_space.shape == (8, 7)
    assert chunked.metadata["render_fps"] == 2.5
    begin(chunked)
    pictures, render = [], Simulator.render
    monkeypatch.setattr(Simulator, "render", lambda s, *a: pictures.append(a) or render(s, *a))
    row = chunked.step(actions)
    assert pictures == [("agentview",)]
    np.testing.assert_array_equal(chunked.simulator.state(), env.simulator.state())
    assert_equal(row, single)
    assert row[4]["frame_index"] == 8


@needs_libero
def test_success_terminates_inside_a_chunk(chunked):
    begin(chunked, init_state=0)
    simulator = chunked.simulator
    actions = []
    for action in Expert(simulator.control_env, np.random.default_rng(0)):
        actions.append(action)
        simulator.step(action)
        if simulator.success:
            break
    assert simulator.success
    steps = len(actions)
    actions = np.array([*actions, *[WAIT_ACTION] * (-steps % 8)])
    begin(chunked, init_state=0)
    *before, last = [chunked.step(chunk) for chunk in actions.reshape(-1, 8, 7)]
    assert all(row[1:4] == (0.0, False, False) for row in before)
    assert last[1:4] == (1.0, True, False)
    assert (last[4]["frame_index"], last[4]["success"]) == (steps, True)
    with pytest.raises(ResetNeeded):
        chunked.step(actions[:8])


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
def test_before_the_first_reset_and_after_close(env):
    fresh = make(render_mode="rgb_array")
    for call in (fresh.render, lambda: fresh.step(WAIT_ACTION), lambda: fresh.simulator):
        with pytest.raises(ResetNeeded, match=r"reset\(\)"):
            call()
    first = begin(env)
    env.close()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step(WAIT_ACTION)
    assert_equal(begin(env), first)


# Vectors of environments.


@needs_libero
@pytest.mark.parametrize(("mode", "how"), [("sync", {}), ("async", {"context": "spawn"})])
def test_rows_of_a_vector_are_single_environments(env, mode, how):
    seeds = [3, 4] if mode == "async" else [3]
    actions = random_actions(2 * len(seeds)).reshape(2, len(seeds), 7)
    settings = {"tasks": (0,), "image_size": 84, "settle_steps": 5}
    envs = gym.make_vec("LIBERO-v0", len(seeds), mode, vector_kwargs=how, **settings)
    try:
        rows = [envs.reset(seed=seeds), *[envs.step(action) for action in actions]]
    finally:
        envs.close()
    for row, seed in enumerate(seeds):
        alone = [env.reset(seed=seed, options={"task_id": 0})]
        alone += [env.step(action[row]) for action in actions]
        for (observation, *_, info), (mine, *_, my_info) in zip(rows, alone, strict=True):
            assert_equal({key: value[row] for key, value in observation.items()}, mine)
            assert {key: info[key][row] for key in my_info} == my_info
