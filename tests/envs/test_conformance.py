"""Gymnasium's and stable-baselines3's own checkers, and making environments by id."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from toy import ToyDataset, ToyWorld

import wmgym
from wmgym.envs.world_model import WorldModelEnv, WorldModelVectorEnv

ID = "WorldModel-LIBERO-v0"


@pytest.fixture
def arguments():
    return {"world": ToyWorld(), "dataset": ToyDataset(), "reward_weights": {"lpips": 0.0}}


@pytest.mark.parametrize("chunk", [None, 4])
def test_gymnasium_check_env(arguments, chunk):
    assert wmgym.__version__
    env = gym.make(ID, render_mode="rgb_array", action_chunk=chunk, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Box (high|low)'s value is -?infinity.*")
        warnings.filterwarnings("ignore", message=".*A Box observation space m.*imum value is.*")
        check_env(env.unwrapped)


def test_stable_baselines3_check_env(arguments):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checker.check_env(WorldModelEnv(**arguments))


def test_made_by_id(arguments):
    env = gym.make(ID, **arguments)
    assert isinstance(env.unwrapped, WorldModelEnv)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert env.get_wrapper_attr("instruction") == info["instruction"]
    assert isinstance(info["task_id"], int)
    steps = 0
    while True:
        observation, reward, terminated, truncated, info = env.step(info["reference_action"])
        steps += 1
        assert observation in env.observation_space
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        assert reward == 0
        if truncated:
            break
    assert steps == 8
    with pytest.raises(ResetNeeded, match=r"no episode is running: call reset\(\)"):
        env.step(env.action_space.sample())
    env.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environment_made_by_id(arguments, mode):
    env = gym.make_vec(ID, num_envs=4, autoreset_mode=mode, group_size=2, **arguments)
    assert isinstance(env, WorldModelVectorEnv)
    assert env.metadata["autoreset_mode"] is mode
    assert WorldModelVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.metadata["render_fps"] == 20
    observation, infos = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(8):
        assert observation in env.observation_space
        assert infos.keys() == {
            f"{mark}{key}" for key in infos if not key.startswith("_") for mark in ("", "_")
        }
        observation, reward, terminated, truncated, infos = env.step(env.action_space.sample())
        assert (reward.dtype, reward.shape) == (np.float64, (4,))
        for flags in (terminated, truncated):
            assert (flags.dtype, flags.shape) == (np.bool_, (4,))
    assert truncated.all()
    env.close()


def test_vector_environment_takes_max_episode_steps(arguments):
    env = gym.make_vec(ID, num_envs=1, max_episode_steps=2, **arguments)
    env.reset(seed=0)
    assert [bool(env.step(np.zeros((1, 7)))[3][0]) for _ in range(2)] == [False, True]


def test_single_environment_is_the_batch_of_one(arguments):
    single, vector = WorldModelEnv(**arguments), WorldModelVectorEnv(1, **arguments)
    observation, info = single.reset(seed=4)
    batch, infos = vector.reset(seed=4)
    for _ in range(3):
        assert data_equivalence(observation, {k: v[0] for k, v in batch.items()}, exact=True)
        assert info["frame_index"] == infos["frame_index"][0]
        action = single.action_space.sample()
        observation, reward, *_, info = single.step(action)
        batch, rewards, *_, infos = vector.step(action[None])
        assert reward == rewards[0]
        assert info["reward_terms"]["mae"] == infos["reward_terms"]["mae"][0]
        state = single.get_state()
    single.step(action)
    seen, told = single.set_state(state)
    assert data_equivalence(seen, observation, exact=True)
    assert data_equivalence(told, {key: info[key] for key in told}, exact=True)
    repeated = single.step(action)
    single.set_state(state)
    assert data_equivalence(repeated, single.step(action), exact=True)


@pytest.mark.parametrize(("chunk", "fps"), [(None, 20), (8, 2.5)])
def test_frames_are_shown_at_the_pace_of_steps(arguments, chunk, fps):
    for kind in (WorldModelEnv, WorldModelVectorEnv):
        assert kind(action_chunk=chunk, **arguments).metadata["render_fps"] == fps


def test_refused_reset_leaves_the_single_environment_as_it_was(arguments):
    env = WorldModelEnv(**arguments)
    env.reset(seed=3)
    with pytest.raises(ValueError, match="episode_id=99"):
        env.reset(seed=4, options={"episode_id": 99})
    assert env.np_random_seed == 3


@pytest.mark.parametrize("given", [np.asarray, torch.from_numpy])
def test_single_environment_speaks_of_one_action(arguments, given):
    env = WorldModelEnv(**arguments)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action has shape \(6,\), expected \(7,\)"):
        env.step(given(np.zeros(6)))
    with pytest.raises(ValueError, match=r"first at index \[2\]"):
        env.step(given(np.array([0, 0, np.nan, 0, 0, 0, 0])))


def test_single_environment_refuses_vector_arguments(arguments):
    with pytest.raises(ValueError, match="group_size"):
        WorldModelEnv(group_size=2, **arguments)
