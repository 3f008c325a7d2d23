"""Recording imagined rollouts with one call, and with Gymnasium's own wrappers."""

from __future__ import annotations

import weakref

import av
import gymnasium as gym
import numpy as np
import pytest
from PIL import Image
from toy import ToyDataset, ToyWorld

from wmgym.recording import (
    StepPicture,
    noisy_reference_policy,
    record_rollout,
    reference_policy,
    rollouts,
)

STEPS = 6


def pixel_reward(inputs):
    return -(inputs.frames - inputs.reference_frames).abs().mean((2, 3, 4))


def arguments(**changes):
    defaults = {
        "world": ToyWorld(),
        "dataset": ToyDataset(),
        "reward": pixel_reward,
        "horizon": STEPS,
    }
    return defaults | changes


def make(**changes):
    return gym.make("WorldModel-LIBERO-v0", **arguments(**changes))


def make_vec(num_envs, **changes):
    return gym.make_vec("WorldModel-LIBERO-v0", num_envs=num_envs, **arguments(**changes))


def noisy(scale=0.5, seed=0):
    return noisy_reference_policy(scale, np.random.default_rng(seed))


def video_shape(path):
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24").shape for f in container.decode(video=0)]
    assert len(set(frames)) == 1
    return (len(frames), *frames[0])


@pytest.fixture
def seen(monkeypatch):
    """The `StepFrames` of every composed picture."""
    steps = []
    compose = StepPicture.compose

    def spy(self, frames, rewards, terms):
        steps.append((frames, list(rewards), dict(terms)))
        return compose(self, frames, rewards, terms)

    monkeypatch.setattr(StepPicture, "compose", spy)
    return steps


def test_video_and_strip(tmp_path):
    record = record_rollout(make(), noisy(), tmp_path / "new" / "noise_0.5", seed=3)
    assert record.video == tmp_path / "new" / "noise_0.5.mp4"
    assert record.strip == tmp_path / "new" / "noise_0.5.png"
    assert sorted(p.name for p in record.video.parent.iterdir()) == [
        "noise_0.5.mp4",
        "noise_0.5.png",
    ]
    count, height, width, _ = video_shape(record.video)
    assert count == STEPS + 1 == record.control_steps + 1
    assert width == 4 * 240 + 3 * 16 + 2 * 24
    assert height > 240
    with Image.open(record.strip) as strip:
        assert strip.width == 24 + 104 + (STEPS + 1) * 126 - 6 + 24
    assert record.rewards.shape == (STEPS,)
    assert (record.rewards < 0).all()
    assert record.truncated
    assert not record.terminated
    assert record.instruction == f"push the square along path {record.episode_id}"


def test_rewards_are_those_of_the_episode(tmp_path):
    record = record_rollout(make(), noisy(), tmp_path / "x", seed=3)
    env, policy = make(), noisy()
    observation, info = env.reset(seed=3)
    assert record.frame_index == info["frame_index"]
    rewards, ended = [], False
    while not ended:
        observation, reward, _, ended, info = env.step(policy(observation, info))
        rewards.append(reward)
    np.testing.assert_array_equal(record.rewards, rewards)


def test_frames_are_those_of_the_environment(tmp_path, seen):
    env = make(reward="R1")
    start = {"episode_id": 1, "frame_index": 4}
    record = record_rollout(env, noisy(), tmp_path / "x", options=start)
    recorded = ToyDataset().read(1, 4, 4 + STEPS + 1).images
    replay, policy = make(reward="R1"), noisy()
    observation, info = replay.reset(options=start)
    assert (record.episode_id, record.frame_index) == (1, 4)
    for t, (frames, rewards, terms) in enumerate(seen):
        assert frames.step == t == len(rewards)
        assert frames.reference is None
        np.testing.assert_array_equal(frames.policy, observation["image"])
        np.testing.assert_array_equal(frames.recorded, recorded[t])
        assert set(terms) == ({"action_l1"} if t else set())
        if t < STEPS:
            observation, *_, info = replay.step(policy(observation, info))
    assert len(seen) == STEPS + 1
    np.testing.assert_allclose(record.terms["action_l1"], -record.rewards)


def test_frames_that_are_not_drawn_are_left_out(tmp_path, seen):
    env = make(action_chunk=2, reward_every=2)
    record = record_rollout(env, noisy(), tmp_path / "x", options={"episode_id": 1}, columns=3)
    assert record.control_steps == STEPS
    start = env.unwrapped.vector.starts[0]
    assert [frames.step for frames, *_ in seen] == [*range(0, STEPS + 1, 2)]
    for frames, rewards, _ in seen[1:]:
        np.testing.assert_array_equal(frames.recorded, start.images[frames.step - 1])
        assert len(rewards) == frames.step
    assert video_shape(record.video)[0] == STEPS // 2 + 1


def test_without_reference_branch_its_panel_is_left_out(tmp_path):
    record = record_rollout(make(reward="R1"), noisy(), tmp_path / "x", seed=0)
    assert video_shape(record.video)[2] == 3 * 240 + 2 * 16 + 2 * 24


def test_the_reference_shows_no_difference(tmp_path, seen):
    record = record_rollout(make(), reference_policy, tmp_path / "x", seed=0)
    assert (record.rewards == 0).all()
    assert all((frames.difference == 0).all() for frames, *_ in seen)
    assert any((frames.policy != frames.recorded).any() for frames, *_ in seen)


def test_chunks_give_a_frame_per_control_step(tmp_path, seen):
    record = record_rollout(make(action_chunk=4), noisy(), tmp_path / "x", seed=0)
    assert record.rewards.shape == (2,)
    assert record.control_steps == STEPS
    assert video_shape(record.video)[0] == STEPS + 1
    assert seen[-1][1] == [record.rewards[0]] * 4 + [record.rewards[1]] * 2


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_one_row_of_a_vector_environment(tmp_path, seen, mode, output):
    vector = make_vec(4, reward="R1", group_size=2, autoreset_mode=mode, output=output)
    record = record_rollout(vector, noisy(), tmp_path / "row", seed=5, row=2)
    rows = [frames for frames, *_ in seen]
    assert video_shape(record.video)[0] == STEPS + 1
    assert record.truncated
    assert record.terms["action_l1"].shape == record.rewards.shape == (STEPS,)
    np.testing.assert_allclose(record.terms["action_l1"], -record.rewards, rtol=1e-6)
    seen.clear()
    single = record_rollout(make(reward="R1"), reference_policy, tmp_path / "one", seed=7)
    assert (single.episode_id, single.frame_index) == (record.episode_id, record.frame_index)
    for left, (right, *_) in zip(rows, seen, strict=True):
        np.testing.assert_array_equal(left.recorded, right.recorded)


def test_ends_early_on_success_and_on_request(tmp_path):
    start = {"episode_id": 0, "frame_index": 2}

    def right(observation, info):
        return np.array([1, 0, 0, 0, 0, 0, 0], np.float32)

    env = make(world=ToyWorld(success_at=0.7), horizon=15)
    record = record_rollout(env, right, tmp_path / "success", options=start)
    assert record.terminated
    assert 0 < record.control_steps < 15
    assert video_shape(record.video)[0] == record.control_steps + 1
    short = record_rollout(make(), right, tmp_path / "short", options=start, max_steps=2)
    assert short.control_steps == 2
    assert not short.truncated
    assert video_shape(short.video)[0] == 3


def test_streams_to_disk(tmp_path, monkeypatch):
    pictures = []
    write = rollouts.VideoWriter.write

    def spy(self, frame):
        write(self, frame)
        pictures.append(weakref.ref(frame))
        assert sum(picture() is not None for picture in pictures) <= 2

    monkeypatch.setattr(rollouts.VideoWriter, "write", spy)

    def policy(observation, info):
        written.append(len(pictures))
        return info["reference_action"]

    written = []
    record_rollout(make(), policy, tmp_path / "x", seed=0, strip=False)
    assert written == [0, *range(2, STEPS + 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_a_failing_policy_leaves_nothing(tmp_path):
    calls = []

    def policy(observation, info):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stop")
        return info["reference_action"]

    with pytest.raises(RuntimeError, match="stop"):
        record_rollout(make(), policy, tmp_path / "x", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_noise_is_reproducible_bounded_and_its_own():
    action = np.array([0.9] * 7, np.float32)
    draws = [noisy(0.5, 3)(None, {"reference_action": action}) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    assert (np.abs(draws[0]) <= 1).all()
    assert draws[0].dtype == np.float32
    np.testing.assert_array_equal(noisy(0.0)(None, {"reference_action": action}), action)
    with pytest.raises(ValueError, match="scale"):
        noisy(-1.0)


def test_bad_requests(tmp_path):
    with pytest.raises(TypeError, match="WorldModel"):
        record_rollout(gym.make("CartPole-v1"), reference_policy, tmp_path / "x")
    for wrong in ({"row": 1}, {"columns": 1}, {"max_steps": 0}, {"fps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            record_rollout(make(), reference_policy, tmp_path / "x", **wrong)
    mask = {"reset_mask": np.array([True])}
    with pytest.raises(ValueError, match="reset_mask"):
        record_rollout(make(), reference_policy, tmp_path / "x", options=mask)
    assert list(tmp_path.iterdir()) == []


def test_gymnasium_records_the_single_environment(tmp_path):
    pytest.importorskip("moviepy")
    env = make(reward="R1", render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "v"), episode_trigger=lambda _: True)
    record_rollout(env, reference_policy, tmp_path / "own", seed=0)
    env.close()
    (path,) = (tmp_path / "v").glob("*.mp4")
    assert video_shape(path) == (STEPS + 1, 40, 80, 3)


def test_gymnasium_records_the_vector_environment(tmp_path):
    pytest.importorskip("moviepy")
    env = make_vec(4, reward="R1", render_mode="rgb_array")
    env = gym.wrappers.vector.RecordVideo(
        env, str(tmp_path / "v"), video_aspect_ratio=(1, 1), episode_trigger=lambda _: True
    )
    observation, info = env.reset(seed=0)
    for _ in range(STEPS):
        observation, *_, info = env.step(reference_policy(observation, info))
    env.close()
    (path,) = (tmp_path / "v").glob("*.mp4")
    count, height, width, _ = video_shape(path)
    assert count == STEPS + 1
    assert height * width == 4 * 40 * 80
