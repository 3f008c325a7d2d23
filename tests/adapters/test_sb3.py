"""The stable-baselines3 adapter: what it says is what the vector environment said."""

from __future__ import annotations

import importlib
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from toy import ToyDataset, ToyWorld

from wmgym.envs.world_model import WorldModelEnv, WorldModelVectorEnv
from wmgym.extras import MissingExtraError
from wmgym.spaces import observation_space

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecTransposeImage

from wmgym.adapters.sb3 import SB3VecEnv

ROWS = 3


def arguments(**changes):
    return {
        "world": ToyWorld(),
        "dataset": ToyDataset(),
        "reward_weights": {"lpips": 0.0},
        "horizon": 3,
    } | changes


def make(num_envs=ROWS, **changes):
    return SB3VecEnv(num_envs, **arguments(**changes))


def actions_of(env, t=0):
    shape = (env.num_envs, *env.action_space.shape)
    return np.random.default_rng(t).uniform(-1, 1, shape).astype(np.float32)


def assert_equal(left, right):
    assert data_equivalence(left, right, exact=True)


def test_equals_the_vector_environment():
    adapted = make()
    plain = WorldModelVectorEnv(ROWS, **arguments(autoreset_mode="SameStep"))
    adapted.seed(5)
    first, infos = plain.reset(seed=5)
    assert_equal(adapted.reset(), first)
    assert [i["frame_index"] for i in adapted.reset_infos] == infos["frame_index"].tolist()
    for t in range(7):
        observation, rewards, dones, row_infos = adapted.step(actions_of(adapted, t))
        expected, plain_rewards, terminated, truncated, plain_infos = plain.step(
            actions_of(adapted, t)
        )
        assert_equal(observation, expected)
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(rewards, plain_rewards.astype(np.float32))
        np.testing.assert_array_equal(dones, terminated | truncated)
        ending = plain_infos.get("final_info", plain_infos)
        for row, info in enumerate(row_infos):
            assert info["frame_index"] == ending["frame_index"][row]
            assert info["reward_terms"]["mae"] == ending["reward_terms"]["mae"][row]
            assert ("terminal_observation" in info) == dones[row]
            if dones[row]:
                assert_equal(info["terminal_observation"], plain_infos["final_obs"][row])
                assert info["TimeLimit.truncated"] is True
                began = adapted.reset_infos[row]
                assert began["frame_index"] == plain_infos["frame_index"][row]
                assert not {"final_obs", "final_info", "terminal_observation"} & set(began)


def test_equals_stable_baselines3_over_single_environments():
    world, dataset = ToyWorld(), ToyDataset()
    singles = DummyVecEnv(
        [lambda: WorldModelEnv(**arguments(world=world, dataset=dataset)) for _ in range(ROWS)]
    )
    batched = make(world=world, dataset=dataset)
    assert batched.observation_space == singles.observation_space
    assert batched.action_space == singles.action_space
    singles.seed(2)
    batched.seed(2)
    assert_equal(dict(singles.reset()), batched.reset())
    for t in range(4):
        left, right = singles.step(actions_of(batched, t)), batched.step(actions_of(batched, t))
        assert_equal((dict(left[0]), *left[1:3]), right[:3])
        for one, other in zip(left[3], right[3], strict=True):
            one = {k: v for k, v in one.items() if k in other}
            other = {k: v for k, v in other.items() if k in one}
            assert_equal(one, other)
        for one, other in zip(singles.reset_infos, batched.reset_infos, strict=True):
            assert_equal(one, other)


def test_all_rows_share_one_world():
    world = ToyWorld()
    env = make(16, world=world, reward="R1")
    env.reset()
    env.step(actions_of(env))
    assert world.rows_stepped == [16]


def test_seeds_hold_for_one_reset():
    env = make()
    env.seed(4)
    first, second = env.reset(), env.reset()
    env.seed(4)
    assert_equal(env.reset(), first)
    assert_equal(env.reset(), second)
    one = make(1)
    one.seed(5)
    np.testing.assert_array_equal(one.reset()["image"][0], first["image"][1])


def test_options_hold_for_one_reset():
    env = make()
    env.set_options([{"episode_id": i, "frame_index": 2 * i} for i in range(ROWS)])
    env.reset()
    assert [i["episode_id"] for i in env.reset_infos] == [0, 1, 2]
    assert [i["frame_index"] for i in env.reset_infos] == [0, 2, 4]
    assert env.get_attr("instruction") == [f"push the square along path {i}" for i in range(ROWS)]
    assert all(options == {} for options in env._options)
    env.set_options([{"episode_id": 0}, {}, {}])
    with pytest.raises(ValueError, match=r"\['episode_id'\] are given for some"):
        env.reset()


def test_predicted_success_ends_and_is_reported():
    env = make(world=ToyWorld(success_at=0.0), horizon=4)
    env.reset()
    _, _, dones, infos = env.step(actions_of(env))
    assert dones.all()
    for info in infos:
        assert info["is_success"] is True
        assert info["TimeLimit.truncated"] is False
    env = make(world=ToyWorld(success_at=2.0), horizon=1)
    env.reset()
    _, _, dones, infos = env.step(actions_of(env))
    assert dones.all()
    assert [i["is_success"] for i in infos] == [False] * ROWS
    env = make()
    env.reset()
    assert "is_success" not in env.step(actions_of(env))[3][0]


def test_success_is_remembered_until_the_end_of_a_group_and_no_longer():
    env = make(2, world=ToyWorld(success_at=0.55), group_size=2, horizon=2, starts="episodes")
    right = np.array([[1.0] + [0.0] * 6, [-1.0] + [0.0] * 6], np.float32)
    env.reset()
    told = [[i["is_success"] for i in env.step(a)[3]] for a in (right, -right, -0 * right)]
    assert told == [[True, False], [True, False], [False, False]]


def test_monitored_returns_are_sums_of_rewards():
    env = VecMonitor(make())
    assert env.env_is_wrapped(VecMonitor) == [False] * ROWS
    env.reset()
    total = np.zeros(ROWS)
    for t in range(3):
        _, rewards, dones, infos = env.step(actions_of(env, t))
        total += rewards
    assert dones.all()
    np.testing.assert_allclose([i["episode"]["r"] for i in infos], total, rtol=1e-6)
    assert [i["episode"]["l"] for i in infos] == [3] * ROWS


def test_images_are_transposed_with_the_terminal_ones():
    env = VecTransposeImage(make(horizon=1))
    assert env.reset()["image"].shape == (ROWS, 3, 40, 40)
    observation, _, _, infos = env.step(actions_of(env))
    assert observation["image"].shape == (ROWS, 3, 40, 40)
    assert infos[0]["terminal_observation"]["image"].shape == (3, 40, 40)


def test_rendering():
    env = make(4, render_mode="rgb_array")
    env.reset()
    assert [frame.shape for frame in env.get_images()] == [(40, 80, 3)] * 4
    assert env.render().shape == (80, 160, 3)
    assert make().get_images() == [None] * ROWS
    env.close()


class CountEndings(BaseCallback):
    def __init__(self):
        super().__init__()
        self.endings = 0

    def _on_step(self):
        self.endings += sum("episode" in info for info in self.locals["infos"])
        return True


@pytest.mark.parametrize("chunk", [None, 2])
def test_ppo_runs(chunk):
    env = VecMonitor(make(4, action_chunk=chunk, horizon=4))
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    count = CountEndings()
    model.learn(64, callback=count)
    assert count.endings == 16 * (chunk or 1)
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))


def test_attributes_and_methods_of_all_rows():
    env = make()
    env.reset()
    assert env.get_attr("group_size", [0, 2]) == [1, 1]
    assert env.has_attr("world")
    assert not env.has_attr("nothing")
    env.set_attr("render_mode", "rgb_array")
    assert env.env.render_mode == "rgb_array"
    states = env.env_method("get_state")
    assert len(states) == ROWS
    observation = env.step(actions_of(env))[0]
    env.env_method("set_state", states[0])
    assert_equal(env.step(actions_of(env))[0], observation)
    with pytest.raises(ValueError, match="rows of one object"):
        env.set_attr("render_mode", None, indices=0)
    with pytest.raises(ValueError, match="rows of one object"):
        env.env_method("reset", indices=[0, 1])


def test_wraps_a_given_environment_and_its_wrappers():
    inner = WorldModelVectorEnv(ROWS, **arguments(autoreset_mode=AutoresetMode.SAME_STEP))
    env = SB3VecEnv(RecordEpisodeStatistics(inner))
    assert env.env_is_wrapped(RecordEpisodeStatistics, indices=0) == [True]
    assert env.env_is_wrapped(Monitor) == [False] * ROWS
    assert env.get_attr("world")[0] is inner.world
    env.reset()
    total = np.zeros(ROWS)
    for t in range(3):
        _, rewards, dones, infos = env.step(actions_of(env, t))
        assert rewards.shape == (ROWS,)
        assert [("episode" in info) for info in infos] == dones.tolist()
        total += rewards
    assert dones.all()
    np.testing.assert_allclose([info["episode"]["r"] for info in infos], total, rtol=1e-6)
    assert [info["episode"]["l"] for info in infos] == [3] * ROWS
    assert not any("episode" in info for info in env.reset_infos)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_other_autoreset_modes_are_refused(mode):
    with pytest.raises(ValueError, match="make it with autoreset_mode='SameStep'"):
        SB3VecEnv(WorldModelVectorEnv(2, **arguments(autoreset_mode=mode)))
    with pytest.raises(ValueError, match="make it with autoreset_mode='SameStep'"):
        make(autoreset_mode=mode)


def test_arguments_beside_an_environment_are_refused():
    with pytest.raises(ValueError, match=r"num_envs=2\.0: expected an integer"):
        SB3VecEnv(2.0)
    env = WorldModelVectorEnv(2, **arguments(autoreset_mode="SameStep"))
    with pytest.raises(TypeError, match=r"\['horizon'\] given beside"):
        SB3VecEnv(env, horizon=4)


class Talking(gym.Env):
    """Observations with a text; ends at once."""

    observation_space = spaces.Dict({**observation_space((40, 40)), "words": spaces.Text(9)})
    action_space = spaces.Box(-1, 1, (7,), np.float32)

    def _observation(self):
        return {**observation_space((40, 40)).sample(), "words": "hello"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        return self._observation(), 1.0, True, False, {"success": True}


def test_texts_are_left_out():
    env = SB3VecEnv(SyncVectorEnv([Talking] * 2, autoreset_mode="SameStep"))
    assert set(env.observation_space) == {"image", "proprio"}
    assert set(env.reset()) == {"image", "proprio"}
    observation, _, _, infos = env.step(actions_of(env))
    assert set(observation) == set(infos[0]["terminal_observation"]) == {"image", "proprio"}
    assert infos[1]["is_success"] is True


def test_nothing_but_texts_is_refused():
    env = VectorEnv()
    env.num_envs = 2
    env.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    env.single_observation_space = spaces.Dict({"words": spaces.Text(9)})
    env.observation_space = batch_space(env.single_observation_space, 2)
    with pytest.raises(ValueError, match="expected numbers"):
        SB3VecEnv(env)


def test_observations_are_never_written_again():
    env = make()
    observation = env.reset()
    kept = {key: value.copy() for key, value in observation.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(4):
            env.step(actions_of(env, t))
    assert_equal(observation, kept)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "wmgym.adapters.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'wmgym\[sb3\]'"):
        importlib.import_module("wmgym.adapters.sb3")
