"""R1, R2 and R3 through the environment: the reference is at distance 0, cached equals fresh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from toy import ToyDataset, ToyWorld

from wmgym.envs.world_model import WorldModelVectorEnv
from wmgym.rewards.perceptual import LPIPS


def make(num_envs=3, **changes):
    arguments = {"world": ToyWorld(), "dataset": ToyDataset(), "autoreset_mode": "Disabled"}
    return WorldModelVectorEnv(num_envs, **(arguments | changes))


def follow(env, infos, steps, noise=0.0, seed=0):
    """Rewards and terms of the recorded actions plus noise."""
    rng = np.random.default_rng(seed)
    rewards, terms = [], []
    for _ in range(steps):
        action = infos["reference_action"]
        action = action + noise * rng.standard_normal(action.shape).astype(np.float32)
        _, reward, _, truncated, infos = env.step(np.clip(action, -1, 1))
        rewards.append(reward)
        terms.append(infos["reward_terms"])
    assert truncated.all()
    return np.array(rewards), terms


@pytest.mark.parametrize(("chunk", "horizon", "steps"), [(None, 6, 6), (4, 4, 1), (2, 6, 3)])
@pytest.mark.parametrize("group_size", [1, 3])
def test_r3_of_the_reference_is_exactly_zero(chunk, horizon, steps, group_size):
    env = make(6, action_chunk=chunk, horizon=horizon, group_size=group_size)
    _, infos = env.reset(seed=0)
    rewards, terms = follow(env, infos, steps)
    assert (rewards == 0).all()
    assert not np.signbit(rewards).any()
    assert all((t[key] == 0).all() for t in terms for key in ("mae", "lpips"))


def test_a_chunk_beyond_the_horizon_is_cut():
    chunked, stepped = make(2, action_chunk=4, horizon=6), make(2, horizon=6)
    start = {"episode_id": np.array([0, 1]), "frame_index": np.array([3, 5])}
    chunked.reset(options=start)
    stepped.reset(options=start)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 8, 7)).astype(np.float32)
    rewards = []
    for t in range(6):
        expected, reward, _, truncated, infos = stepped.step(actions[:, t])
        rewards.append(reward)
    _, first, _, ended, _ = chunked.step(actions[:, :4])
    assert not ended.any()
    np.testing.assert_allclose(first, np.mean(rewards[:4], 0), rtol=1e-6)
    observation, second, _, ended, chunk_infos = chunked.step(actions[:, 4:])
    assert ended.all()
    assert truncated.all()
    np.testing.assert_allclose(second, np.mean(rewards[4:], 0), rtol=1e-6)
    assert data_equivalence(observation, expected, exact=True)
    np.testing.assert_array_equal(chunk_infos["frame_index"], infos["frame_index"])


def test_an_episode_shorter_than_the_horizon_is_truncated_at_its_end():
    dataset = ToyDataset((4, 30))
    env = make(2, dataset=dataset, starts="episodes")
    _, infos = env.reset(options={"episode_id": np.array([0, 1])})
    ends = []
    for _ in range(3):
        _, reward, _, truncated, infos = env.step(infos["reference_action"])
        assert (reward == 0).all()
        ends.append(truncated.tolist())
    assert ends == [[False, False], [False, False], [True, False]]
    assert infos["frame_index"].tolist() == [3, 3]
    np.testing.assert_array_equal(infos["reference_action"][0], dataset.read(0).actions[3])


def test_a_chunk_beyond_the_episode_repeats_the_last_action():
    dataset = ToyDataset((4,))
    env = make(1, dataset=dataset, action_chunk=6, starts="episodes")
    _, infos = env.reset(seed=0)
    recorded = dataset.read(0).actions
    expected = recorded[[0, 1, 2, 3, 3, 3]]
    np.testing.assert_array_equal(infos["reference_action"][0], expected)
    changed = expected.copy()
    changed[3:] = -changed[3:]
    _, reward, _, truncated, infos = env.step(changed[None])
    assert reward == 0
    assert truncated.all()
    assert infos["frame_index"] == 3


def test_more_noise_less_reward():
    means = []
    for noise in (0.0, 0.1, 0.5):
        env = make(16, horizon=4)
        _, infos = env.reset(seed=0)
        means.append(follow(env, infos, 4, noise)[0].mean())
    assert means[0] == 0
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_r3_is_the_distance_to_the_imagined_reference(net):
    chosen = {"reward_weights": {"mae": 2.0, "lpips": 0.5}, "lpips_net": net}
    env = make(2, horizon=2, output="torch", **chosen)
    _, infos = env.reset(seed=0)
    world, starts = env.world, env.starts
    context = torch.from_numpy(np.stack([s.context_images for s in starts]))
    proprio = torch.from_numpy(np.stack([s.context_proprio for s in starts]))
    state = world.start(context.permute(0, 1, 4, 2, 3).float() / 255, proprio)
    actions = torch.zeros(2, 7)
    _, imagined = world.step(state, actions[:, None])
    _, reference = world.step(state, infos["reference_action"][:, None])
    _, reward, *_, infos = env.step(actions)
    x, y = imagined.frames[:, 0], reference.frames[:, 0]
    mae, lpips = (x - y).abs().mean((1, 2, 3)), LPIPS(net)(x, y)
    torch.testing.assert_close(reward, -(2.0 * mae + 0.5 * lpips), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(infos["reward_terms"]["mae"], mae)
    torch.testing.assert_close(infos["reward_terms"]["lpips"], lpips, rtol=1e-4, atol=1e-6)


def test_r2_is_the_distance_to_the_recording():
    dataset = ToyDataset()
    env = make(2, dataset=dataset, reward="R2", horizon=3, reward_weights={"lpips": 0.0})
    _, infos = env.reset(options={"episode_id": np.array([0, 2]), "frame_index": 4})
    for t in range(3):
        env.step(infos["reference_action"])
        inputs, infos = env.last_step, {"reference_action": np.zeros((2, 7), np.float32)}
        recorded = np.stack([dataset.read(i).images[5 + t] for i in (0, 2)])
        expected = torch.from_numpy(recorded).permute(0, 3, 1, 2).float() / 255
        torch.testing.assert_close(inputs.recorded_frames[:, 0], expected)
        assert inputs.reference_frames is None
    env.reset(options={"episode_id": np.array([0, 2]), "frame_index": 4})
    observation, reward, *_, infos = env.step(np.zeros((2, 7), np.float32))
    recorded = np.stack([dataset.read(i).images[5] for i in (0, 2)]).astype(np.float64)
    mae = abs(observation["image"] - recorded).mean((1, 2, 3)) / 255
    np.testing.assert_allclose(-reward, mae, atol=2 / 255)
    np.testing.assert_array_equal(-reward, infos["reward_terms"]["mae"])


def test_r1_compares_actions_and_needs_no_reference_branch():
    world = ToyWorld()
    env = make(2, world=world, reward="R1", horizon=2, render_mode="rgb_array")
    _, infos = env.reset(seed=0)
    action = infos["reference_action"]
    world.rows_stepped.clear()
    _, reward, *_, after = env.step(np.zeros_like(action))
    assert world.rows_stepped == [2]
    np.testing.assert_allclose(reward, -abs(action).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(after["reward_terms"]["action_l1"], -reward)
    recorded = np.stack([s.images[0] for s in env.starts])
    np.testing.assert_array_equal(np.stack(env.render())[:, :, 40:], recorded)
    _, reward, *_ = env.step(after["reference_action"])
    assert (reward == 0).all()


def test_reward_function_sees_everything():
    seen = []

    def reward(inputs):
        seen.append(inputs)
        return inputs.valid.float() * torch.arange(1, 5)

    env = make(4, reward=reward, action_chunk=4, horizon=6, group_size=2)
    env.reset(seed=0)
    actions = np.zeros((4, 4, 7), np.float32)
    _, first, *_ = env.step(actions)
    _, second, *_, infos = env.step(actions)
    assert first.tolist() == [2.5] * 4
    assert second.tolist() == [1.5] * 4
    assert "reward_terms" in infos
    frames = (4, 4, 3, 40, 40)
    for inputs in seen:
        assert inputs.frames.shape == frames
        assert inputs.recorded_frames.shape == frames
        assert inputs.reference_frames.shape == frames
        assert inputs.actions.shape == inputs.reference_actions.shape == (4, 4, 7)
        assert inputs.rows.tolist() == [0, 1, 2, 3]
    bad = make(1, reward=lambda inputs: torch.zeros(1))
    bad.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(n, F\) = \(1, 1\)"):
        bad.step(np.zeros((1, 7), np.float32))


def test_unknown_weights():
    with pytest.raises(ValueError, match="unknown terms \\['ssim'\\]"):
        make(reward_weights={"ssim": 1.0})


def run(env, starts, seed):
    _, infos = env.reset(options=starts)
    return follow(env, infos, 3, noise=0.3, seed=seed)


def test_cached_reference_equals_fresh_reference():
    world = ToyWorld()
    cached, fresh = (make(3, world=world, horizon=3, cache_mb=mb) for mb in (64, 0))
    one = {"episode_id": np.array([0, 1, 2]), "frame_index": 2}
    mixed = {"episode_id": np.array([3, 1, 0]), "frame_index": 2}
    for seed, starts in enumerate((one, one, mixed)):
        world.rows_stepped.clear()
        left = run(cached, starts, seed)
        assert world.rows_stepped == [[6] * 3, [3] * 3, [4] * 3][seed]
        right = run(fresh, starts, seed)
        np.testing.assert_array_equal(left[0], right[0])
        assert data_equivalence(left[1], right[1], exact=True)
    env = cached
    _, infos = env.reset(options=mixed)
    assert (follow(env, infos, 3)[0] == 0).all()


def test_rewards_do_not_depend_on_num_envs():
    many, few = make(5, horizon=3), make(1, horizon=3)
    _, infos = many.reset(seed=20)
    _, other = few.reset(seed=23)
    rewards, _ = follow(many, infos, 3, 0.3)
    rng = np.random.default_rng(0)
    for t in range(3):
        noise = rng.standard_normal((5, 7)).astype(np.float32)[3:4]
        action = np.clip(other["reference_action"] + np.float32(0.3) * noise, -1, 1)
        _, reward, *_, other = few.step(action)
        np.testing.assert_array_equal(reward, rewards[t, 3:4])
