"""The vector environment: resets, groups, snapshots, independence, errors."""

from __future__ import annotations

import dataclasses
import random
import warnings

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from toy import ToyDataset, ToyWorld

from wmgym.envs.edge import Edge
from wmgym.envs.world_model import WorldModelEnv, WorldModelVectorEnv


def pixel_reward(inputs):
    return -(inputs.frames - inputs.reference_frames).abs().mean((2, 3, 4))


def make(num_envs=4, **changes):
    arguments = {
        "world": ToyWorld(),
        "dataset": ToyDataset(),
        "reward": pixel_reward,
        "horizon": 3,
        "autoreset_mode": "Disabled",
    }
    return WorldModelVectorEnv(num_envs, **(arguments | changes))


def actions_of(env, seed=0):
    shape = env.action_space.shape
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_equal(left, right):
    assert data_equivalence(left, right, exact=True)


# Automatic reset: one row of the table per step.


def test_next_step_table():
    env = make(3, autoreset_mode=AutoresetMode.NEXT_STEP)
    _, infos = env.reset(seed=0)
    first = infos["frame_index"].copy()
    table = [env.step(actions_of(env, t)) for t in range(8)]
    assert [bool(row[3].all()) for row in table] == [False, False, True, False] * 2
    assert not any(row[2].any() for row in table)
    assert (table[3][1] == 0).all()
    assert all((row[1] < 0).all() for row in table[:3])
    assert "reward_terms" not in table[3][4]
    elapsed = [row[4]["frame_index"] - first for row in table[:3]]
    np.testing.assert_array_equal(elapsed, [[1] * 3, [2] * 3, [3] * 3])
    assert "final_obs" not in table[2][4]


def test_next_step_ignores_the_action_of_an_ended_row():
    one, two = (make(2, horizon=1, autoreset_mode="NextStep") for _ in range(2))
    for env in (one, two):
        env.reset(seed=3)
        env.step(actions_of(env))
    assert_equal(one.step(actions_of(one, 1)), two.step(actions_of(two, 2)))


def test_same_step_table():
    env = make(3, autoreset_mode="SameStep")
    env.reset(seed=0)
    twin = make(3)
    twin.reset(seed=0)
    for t in range(3):
        observation, reward, terminated, truncated, infos = env.step(actions_of(env, t))
        final, final_reward, *_, final_infos = twin.step(actions_of(env, t))
        np.testing.assert_array_equal(reward, final_reward)
        assert truncated.tolist() == [t == 2] * 3
        assert not terminated.any()
        assert ("final_obs" in infos) == (t == 2)
    assert infos["_final_obs"].all()
    assert infos["_final_info"].all()
    for i in range(3):
        assert_equal(infos["final_obs"][i], {k: v[i] for k, v in final.items()})
    assert_equal(infos["final_info"], final_infos)
    assert "reward_terms" not in infos
    begun, begun_infos = twin.reset()
    assert_equal(observation, begun)
    np.testing.assert_array_equal(infos["frame_index"], begun_infos["frame_index"])


def test_disabled_refuses_to_go_on():
    env = make(2, horizon=1)
    env.reset(seed=0)
    env.step(actions_of(env))
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\] have ended"):
        env.step(actions_of(env))


def test_rows_of_different_length_end_alone():
    dataset = ToyDataset((3, 20))
    env = make(2, dataset=dataset, horizon=4, autoreset_mode="NextStep", starts="episodes")
    env.reset(options={"episode_id": np.array([0, 1])})
    truncated = []
    for t in range(4):
        _, reward, _, ends, infos = env.step(actions_of(env, t))
        truncated.append(ends.tolist())
        if t == 2:
            assert reward[0] == 0
            assert reward[1] < 0
            np.testing.assert_array_equal(infos["_reward_terms"], [False, True])
            np.testing.assert_array_equal(infos["_frame_index"], [True, True])
    assert truncated[:3] == [[False, False], [True, False], [False, False]]
    assert truncated[3][1]


def test_equals_a_synchronous_vector_of_single_environments():
    world, dataset = ToyWorld(), ToyDataset((3, 20, 5))
    for mode in AutoresetMode:
        kwargs = {"world": world, "dataset": dataset, "reward": pixel_reward, "horizon": 4}
        ours = WorldModelVectorEnv(3, autoreset_mode=mode, **kwargs)
        theirs = SyncVectorEnv([lambda k=kwargs: WorldModelEnv(**k)] * 3, autoreset_mode=mode)
        theirs.action_space.seed(1)
        assert_equal(ours.reset(seed=7), theirs.reset(seed=7))
        for _ in range(12):
            actions = theirs.action_space.sample()
            expected = theirs.step(actions)
            assert_equal(ours.step(actions), expected)
            ended = expected[2] | expected[3]
            if mode is AutoresetMode.DISABLED and ended.any():
                mask = {"reset_mask": ended}
                left, right = ours.reset(options=dict(mask)), theirs.reset(options=dict(mask))
                assert_equal(left, right)


@pytest.mark.parametrize("chunk", [None, 2])
def test_row_does_not_depend_on_num_envs(chunk):
    kwargs = {"autoreset_mode": "SameStep", "action_chunk": chunk, "horizon": 4}
    many, few = make(6, **kwargs), make(2, **kwargs)
    observation, _ = many.reset(seed=11)
    other, _ = few.reset(seed=13)
    for t in range(9):
        assert_equal({k: v[2:4] for k, v in observation.items()}, other)
        actions = actions_of(many, t)
        observation, reward, _, _, infos = many.step(actions)
        other, other_reward, _, _, other_infos = few.step(actions[2:4])
        np.testing.assert_array_equal(reward[2:4], other_reward)
        np.testing.assert_array_equal(infos["episode_id"][2:4], other_infos["episode_id"])


# Resets.


def test_partial_reset_touches_only_its_rows():
    env, twin = make(4, horizon=6), make(4, horizon=6)
    for e in (env, twin):
        e.reset(seed=0)
        e.step(actions_of(e))
    before = env.get_state()
    mask = np.array([False, True, False, True])
    options = {"reset_mask": mask}
    observation, infos = env.reset(seed=50, options=options)
    assert options == {"reset_mask": mask}
    twin.reset(seed=50, options={"reset_mask": torch.from_numpy(mask)})
    for key in ("instruction", "reference_action", "frame_index"):
        np.testing.assert_array_equal(infos[f"_{key}"], mask)
    np.testing.assert_array_equal(observation["image"][~mask], before.images.numpy()[~mask])
    fresh, _ = make(4, horizon=6).reset(seed=50)
    np.testing.assert_array_equal(observation["image"][mask], fresh["image"][mask])
    after, undisturbed = env.step(actions_of(env, 1)), twin.step(actions_of(env, 1))
    np.testing.assert_array_equal(after[0]["image"][~mask], undisturbed[0]["image"][~mask])
    np.testing.assert_array_equal(after[1][~mask], undisturbed[1][~mask])


def test_start_by_options():
    dataset = ToyDataset()
    env = make(3, dataset=dataset)
    observation, infos = env.reset(
        options={"episode_id": np.array([2, 0, 3]), "frame_index": np.array([4, 0, 28])}
    )
    for i, (episode, frame) in enumerate([(2, 4), (0, 0), (3, 28)]):
        recorded = dataset.read(episode)
        np.testing.assert_array_equal(observation["image"][i], recorded.images[frame])
        np.testing.assert_array_equal(observation["proprio"][i], recorded.proprio[frame])
        np.testing.assert_array_equal(infos["reference_action"][i], recorded.actions[frame])
        assert infos["instruction"][i] == dataset.episodes[episode].instruction
    assert infos["suite"].tolist() == ["libero_object"] * 3
    assert infos["task_id"].tolist() == [0, 0, 1]
    assert infos["proprio_source"].tolist() == ["integrated"] * 3
    _, infos = env.reset(seed=0, options={"episode_id": 1})
    assert infos["episode_id"].tolist() == [1, 1, 1]
    assert len(set(infos["frame_index"].tolist())) > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"episode": 1}, ValueError, "unknown reset options \\['episode'\\]"),
        ({"frame_index": 1}, ValueError, "needs options\\['episode_id'\\]"),
        ({"episode_id": 9}, ValueError, "episode_id=9: the dataset has 4 episodes"),
        ({"episode_id": 0, "frame_index": 19}, ValueError, "0 to 18 are allowed"),
        ({"episode_id": 0, "frame_index": -1}, ValueError, "frame_index=-1"),
        ({"episode_id": 0.5}, TypeError, "expected integers"),
        ({"episode_id": np.array([0, 1])}, ValueError, "shape \\(2,\\)"),
        ({"episode_id": np.array([0, 1, 1, 1])}, ValueError, "differs within a group"),
        ({"reset_mask": [True] * 4}, TypeError, "list"),
        ({"reset_mask": np.ones(4)}, TypeError, "float64"),
        ({"reset_mask": np.ones(3, bool)}, ValueError, "shape \\(3,\\)"),
        ({"reset_mask": np.zeros(4, bool)}, ValueError, "at least one True"),
        ({"reset_mask": np.array([1, 0, 1, 1], bool)}, ValueError, "a part of groups \\[0\\]"),
    ],
)
def test_bad_options(options, error, message):
    env = make(4, group_size=2)
    env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.reset(options=options)


@pytest.mark.parametrize("mask", [None, np.array([False, True])])
@pytest.mark.parametrize("seed", [None, 7])
def test_refused_reset_changes_nothing(mask, seed):
    env, twin = make(2), make(2)
    before, _ = env.reset(seed=0)
    twin.reset(seed=0)
    options = {"episode_id": np.array([0, 99])} | ({} if mask is None else {"reset_mask": mask})
    with pytest.raises(ValueError, match="episode_id=99"):
        env.reset(seed=seed, options=options)
    assert env.np_random_seed == 0
    assert_equal({"image": env.get_state().images.numpy()}, {"image": before["image"]})
    assert_equal(env.step(actions_of(env)), twin.step(actions_of(env)))
    assert_equal(env.reset(), twin.reset())


def test_must_be_reset_first():
    env = make(2)
    with pytest.raises(ResetNeeded):
        env.step(actions_of(env))
    with pytest.raises(ResetNeeded, match="all environments"):
        env.reset(options={"reset_mask": np.array([True, False])})


def test_seeds():
    env = make(3)
    one, _ = env.reset(seed=5)
    two, _ = env.reset(seed=[5, 6, 7])
    assert_equal(one, two)
    with pytest.raises(ValueError, match="seed has 2 entries"):
        env.reset(seed=[1, 2])
    continued, _ = env.reset()
    assert not np.array_equal(continued["image"], one["image"])


# Groups.


def test_members_share_start_and_reference_and_differ_by_action():
    env = make(6, group_size=3, autoreset_mode="NextStep")
    for seed in (0, None):
        observation, infos = env.reset(seed=seed)
        for key in ("episode_id", "frame_index"):
            groups = infos[key].reshape(2, 3)
            assert (groups == groups[:, :1]).all()
        images = observation["image"].reshape(2, 3, -1)
        assert (images == images[:, :1]).all()
    for _ in range(5):
        observation, _, _, truncated, infos = env.step(actions_of(env))
        assert len({tuple(x) for x in truncated.reshape(2, 3).T.tolist()}) == 1


def test_group_equals_its_members_alone():
    group = make(4, group_size=4)
    alone = make(4)
    _, infos = group.reset(seed=2)
    start = {k: int(infos[k][0]) for k in ("episode_id", "frame_index")}
    alone.reset(options=start)
    for t in range(3):
        actions = actions_of(group, t)
        assert_equal(group.step(actions), alone.step(actions))


def test_permuting_members_permutes_results():
    env = make(4, group_size=4)
    order = np.array([2, 0, 3, 1])
    env.reset(seed=2)
    one = [env.step(actions_of(env, t)) for t in range(3)]
    env.reset(seed=2)
    two = [env.step(actions_of(env, t)[order]) for t in range(3)]
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left[0]["image"][order], right[0]["image"])
        np.testing.assert_array_equal(left[1][order], right[1])


def test_reference_is_rolled_once_per_group():
    world = ToyWorld()
    env = make(8, group_size=4, world=world)
    env.reset(seed=0)
    world.rows_stepped.clear()
    env.step(actions_of(env))
    assert world.rows_stepped == [10]


def test_success_terminates_alone_but_not_in_groups():
    kwargs = {"world": ToyWorld(success_at=0.5), "horizon": 6, "starts": "episodes"}
    push = np.zeros((2, 7), np.float32)
    push[0, 0] = 1.0
    push[1, 0] = -1.0
    alone = make(2, **kwargs)
    alone.reset(options={"episode_id": 0})
    _, _, terminated, truncated, infos = alone.step(push)
    assert terminated.tolist() == [True, False]
    assert infos["success"].tolist() == [True, False]
    assert not truncated.any()
    group = make(2, group_size=2, **kwargs)
    group.reset(options={"episode_id": 0})
    _, _, terminated, _, infos = group.step(push)
    assert not terminated.any()
    assert infos["success"].tolist() == [True, False]


@pytest.mark.parametrize("reward", ["R1", "R2", "R3", pixel_reward])
def test_rewarding_every_second_frame(reward):
    whole, half = (
        make(4, action_chunk=4, horizon=8, group_size=2, reward=reward, reward_every=every)
        for every in (1, 2)
    )
    one, other = (env.reset(seed=0) for env in (whole, half))
    assert_equal(one, other)
    for t in range(2):
        actions = actions_of(whole, t)
        seen, _, _, ended, infos = whole.step(actions)
        seen_half, rewards, _, ended_half, infos_half = half.step(actions)
        assert_equal((seen, ended), (seen_half, ended_half))
        assert_equal(infos["frame_index"], infos_half["frame_index"])
        frames, seconds = whole.last_step.frames[:, 1::2], half.last_step.frames
        assert torch.equal(frames, seconds)
        if reward is pixel_reward:
            expected = (
                -(frames - whole.last_step.reference_frames[:, 1::2]).abs().mean((1, 2, 3, 4))
            )
            np.testing.assert_allclose(rewards, expected, rtol=1e-5)


def test_the_reference_may_be_what_the_demonstrator_meant():
    class Disturbed(ToyDataset):
        def read(self, *given, **kwargs):
            episode = super().read(*given, **kwargs)
            return dataclasses.replace(episode, clean_actions=0.5 * episode.actions)

    recorded = make(4, dataset=Disturbed(), reward="R1")
    intended, plain = (
        make(4, dataset=dataset, reward="R1", reference_actions="intended")
        for dataset in (Disturbed(), ToyDataset())
    )
    executed = recorded.reset(seed=0)[1]["reference_action"]
    meant = intended.reset(seed=0)[1]["reference_action"]
    np.testing.assert_array_equal(meant, 0.5 * executed)
    np.testing.assert_array_equal(plain.reset(seed=0)[1]["reference_action"], executed)
    assert (intended.step(meant)[1] == 0).all()
    with pytest.raises(ValueError, match="allowed are 'recorded' and 'intended'"):
        make(4, reference_actions="meant")
    with pytest.raises(ValueError, match="reference_actions is"):
        intended.set_state(recorded.get_state())


@pytest.mark.parametrize("sizes", [{"action_chunk": 3}, {"action_chunk": 4, "horizon": 6}])
def test_what_is_rewarded_must_fit_the_chunk(sizes):
    with pytest.raises(ValueError, match="must be multiples of it"):
        make(4, **({"horizon": 12} | sizes), reward_every=4)


def test_rewarding_some_frames_ends_at_one_of_them():
    env = make(1, action_chunk=4, horizon=8, reward_every=4, starts="episodes")
    env.reset(options={"episode_id": 2, "frame_index": 18 - 1 - 7})
    env.step(actions_of(env))
    assert env.starts[0].steps == 4
    with pytest.raises(ValueError, match=r"0 to 13 are allowed"):
        env.reset(options={"episode_id": 2, "frame_index": 14})


def test_episodes_too_short_for_a_rewarded_frame_are_no_starts():
    short, long = ToyDataset(lengths=(4, 4, 4)), ToyDataset(lengths=(4, 5, 4))
    kwargs = {"action_chunk": 4, "horizon": 4, "reward_every": 4}
    with pytest.raises(ValueError, match="more than 4 steps"):
        make(1, dataset=short, **kwargs)
    env = make(4, dataset=long, **kwargs)
    env.reset(seed=0)
    assert {start.info.episode_id for start in env.starts} == {1}
    _, rewards, *_ = env.step(actions_of(env))
    assert np.isfinite(rewards).all()


def test_success_within_a_chunk_cuts_it():
    kwargs = {"world": ToyWorld(success_at=0.65), "starts": "episodes", "horizon": 8}
    push = np.zeros((1, 4, 7), np.float32)
    push[..., 0] = 1.0
    env = make(1, action_chunk=4, **kwargs)
    env.reset(options={"episode_id": 0})
    observation, reward, terminated, _, infos = env.step(push)
    assert terminated.all()
    assert infos["frame_index"][0] == 2
    single = make(1, **kwargs)
    single.reset(options={"episode_id": 0})
    rewards = []
    for t in range(2):
        expected, r, *_ = single.step(push[:, t])
        rewards.append(r)
    assert_equal(observation, expected)
    np.testing.assert_allclose(reward, np.mean(rewards, 0), rtol=1e-6)


# Snapshots.


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_restored_state_repeats_exactly(mode):
    env = make(4, group_size=2, autoreset_mode=mode)
    env.reset(seed=0)
    env.step(actions_of(env))
    state = env.get_state()
    runs = []
    for _ in range(3):
        runs.append([env.set_state(state), *(env.step(actions_of(env, t)) for t in range(9))])
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 2}, "num_envs is 4 in the snapshot and 2 here"),
        ({"group_size": 2}, "group_size is 1 in the snapshot and 2 here"),
        ({"horizon": 5}, "horizon is 3 in the snapshot and 5 here"),
        ({"action_chunk": 2}, "action_chunk is 1 in the snapshot and 2 here"),
        ({"world": ToyWorld(context=3)}, r"world is \('toy', .*, 2\) in the snapshot"),
        ({"dataset": ToyDataset((9, 9))}, "dataset is '.*' in the snapshot"),
        ({"reward": "R1"}, "references is 'imagined' in the snapshot and 'recorded' here"),
    ],
)
def test_state_of_another_environment_is_refused(changes, message):
    env, other = make(), make(**changes)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        other.set_state(env.get_state())
    with pytest.raises(TypeError, match=r"state=None: expected what get_state\(\) returned"):
        env.set_state(None)


def test_state_is_restored_in_an_environment_like_it():
    env, twin = make(), make()
    env.reset(seed=0)
    twin.set_state(env.get_state().copy())
    assert_equal(twin.step(actions_of(env)), env.step(actions_of(env)))


def test_state_is_restored_with_what_was_seen():
    env = make(4, group_size=2)
    seen = env.reset(seed=0)
    state = env.get_state()
    env.reset()
    assert_equal(env.set_state(state), seen)


def test_fork_shows_all_rows_as_they_are():
    env = make(4, group_size=2)
    env.reset(options={"episode_id": np.array([0, 0, 1, 1]), "frame_index": 2})
    observation, *_, infos = env.step(actions_of(env))
    same, same_infos = env.fork(0, [0])
    assert_equal(same, observation)
    assert_equal(same_infos, {key: infos[key] for key in same_infos})
    forked, forked_infos = env.fork(3, [0, 1])
    order = [3, 3, 2, 3]
    for key in observation:
        np.testing.assert_array_equal(forked[key], observation[key][order])
    for key in ("instruction", "episode_id", "reference_action"):
        np.testing.assert_array_equal(forked_infos[key], infos[key][order])
        assert forked_infos[f"_{key}"].all()


def test_fork_equals_replay():
    env = make(6, group_size=3, horizon=6)
    env.reset(seed=0)
    first, then = actions_of(env, 0), actions_of(env, 1)
    env.step(first)
    env.fork(1, [2, 3, 4, 5])
    forked = env.step(then)

    replay = make(6, group_size=3, horizon=6)
    _, infos = env.reset(seed=0)
    replay.reset(options={k: int(infos[k][0]) for k in ("episode_id", "frame_index")})
    first[2:] = first[1]
    replay.step(first)
    assert_equal(replay.step(then), forked)


def test_fork_refuses_a_part_of_another_group():
    env = make(6, group_size=3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="a part of groups \\[1\\]"):
        env.fork(0, [1, 3])
    with pytest.raises(ValueError, match="rows are 0 to 5"):
        env.fork(0, [6])
    for rows in (np.array([0, 1, 1, 0, 0, 0], bool), [1.7]):
        with pytest.raises(TypeError, match="expected integers"):
            env.fork(0, rows)


# Actions, output, randomness.


@pytest.mark.parametrize("given", [np.asarray, torch.from_numpy])
def test_bad_actions(given):
    env = make(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape \\(2, 6\\), expected \\(2, 7\\)"):
        env.step(given(np.zeros((2, 6), np.float32)))
    for value in (np.nan, np.inf, -np.inf):
        broken = np.zeros((2, 7), np.float32)
        broken[1, 3] = value
        with pytest.raises(ValueError, match="NaN or infinity, first at index \\[1, 3\\]"):
            env.step(given(broken))


@pytest.mark.parametrize("given", [np.asarray, torch.from_numpy])
def test_out_of_range_is_clipped_with_one_warning(given):
    env, twin = make(2), make(2)
    for e in (env, twin):
        e.reset(seed=0)
    wild = 3.0 * actions_of(env)
    with pytest.warns(UserWarning, match="outside \\[-1, 1\\] are clipped"):
        one = env.step(given(wild))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(given(wild))
    assert_equal(one, twin.step(np.clip(wild, -1, 1)))


def test_tensors_of_actions_stay_on_the_device(monkeypatch):
    edge = Edge("torch", torch.device("cpu"), (2, 7))
    wild = 3.0 * np.random.default_rng(0).standard_normal((4, 2, 7)).astype(np.float32)
    with pytest.warns(UserWarning, match="are clipped"):
        expected = edge.actions(wild, 4)
    actions = torch.from_numpy(wild).requires_grad_()
    with monkeypatch.context() as patch:
        for method in ("cpu", "numpy", "__array__"):
            patch.setattr(torch.Tensor, method, None, raising=False)
        checked = edge.actions(actions, 4)
    assert not checked.requires_grad
    np.testing.assert_array_equal(checked.numpy(), expected.numpy())
    assert abs(actions.detach()).max() > 1


def test_given_actions_are_not_changed():
    env = make(2)
    env.reset(seed=0)
    actions = np.full((2, 7), 0.5, np.float32)
    env.step(actions)
    assert (actions == 0.5).all()


def test_torch_output_equals_numpy_output():
    one, two = (make(3, output=o, autoreset_mode="SameStep") for o in ("numpy", "torch"))
    expected, _ = one.reset(seed=0)
    observation, infos = two.reset(seed=0)
    assert isinstance(infos["reference_action"], torch.Tensor)
    for t in range(4):
        for key in observation:
            assert isinstance(observation[key], torch.Tensor)
            np.testing.assert_array_equal(observation[key].numpy(), expected[key])
        actions = actions_of(one, t)
        expected, reward, *flags, infos = one.step(actions)
        observation, r, *tensors, tensor_infos = two.step(torch.from_numpy(actions))
        assert r.dtype == torch.float32
        np.testing.assert_array_equal(r.numpy(), reward.astype(np.float32))
        for flag, tensor in zip(flags, tensors, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), flag)
        assert infos.keys() == tensor_infos.keys()
    assert not observation["image"].requires_grad
    (observation["proprio"] * torch.ones(8, requires_grad=True)).sum().backward()


def test_observations_are_fresh():
    for output in ("numpy", "torch"):
        env, twin = make(2, output=output), make(2, output=output)
        for e in (env, twin):
            observation, infos = e.reset(seed=0)
        observation, infos = env.reset(seed=0)
        for value in (*observation.values(), infos["reference_action"]):
            value[...] = 0
        left, right = env.step(actions_of(env)), twin.step(actions_of(env))
        for key in observation:
            assert (left[0][key] == right[0][key]).all()
        assert (left[1] == right[1]).all()


def test_returned_observations_stay_as_they_were():
    for output in ("numpy", "torch"):
        env = make(2, output=output)
        observation, _ = env.reset(seed=0)
        kept = {key: np.asarray(value).copy() for key, value in observation.items()}
        env.reset(options={"reset_mask": np.array([False, True])})
        for key, value in observation.items():
            np.testing.assert_array_equal(np.asarray(value), kept[key])


def test_global_generators_are_not_touched():
    env = make(4, autoreset_mode="SameStep")
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    env.reset()
    for t in range(4):
        env.step(actions_of(env, t))
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episode_statistics(mode):
    env = RecordEpisodeStatistics(make(2, autoreset_mode=mode))
    env.reset(seed=0)
    total = np.zeros(2)
    for t in range(3):
        _, reward, _, truncated, infos = env.step(actions_of(env, t))
        total += reward
    assert truncated.all()
    assert infos["episode"]["l"].tolist() == [3, 3]
    np.testing.assert_allclose(infos["episode"]["r"], total)
    env.reset(options={"reset_mask": np.array([True, False])})


def test_render_shows_imagined_and_reference():
    env = make(2, render_mode="rgb_array")
    env.reset(seed=0)
    frames = env.render()
    assert [f.shape for f in frames] == [(40, 80, 3)] * 2
    assert all(f.dtype == np.uint8 for f in frames)
    assert all((f[:, :40] == f[:, 40:]).all() for f in frames)
    observation, *_ = env.step(actions_of(env))
    frames = env.render()
    assert all((f[:, :40] != f[:, 40:]).any() for f in frames)
    np.testing.assert_array_equal(np.stack(frames)[:, :, :40], observation["image"])
    mask = np.array([True, False])
    env.reset(options={"reset_mask": mask})
    again = env.render()
    assert (again[0][:, :40] == again[0][:, 40:]).all()
    np.testing.assert_array_equal(again[1], frames[1])
    assert make(2).render() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 4, "group_size": 3}, "multiple of group_size"),
        ({"num_envs": 0}, "num_envs=0: expected an integer >= 1"),
        ({"num_envs": 2.0}, "num_envs=2.0: expected an integer >= 1"),
        ({"tasks": 3}, "tasks=3: expected a list of task ids"),
        ({"horizon": "8"}, "horizon='8': expected an integer"),
        ({"horizon": 7.5}, "horizon=7.5: expected an integer"),
        ({"action_chunk": 2.0}, "action_chunk=2.0: expected an integer"),
        ({"cache_mb": -1}, "cache_mb=-1: expected a number"),
        ({"reward": "R3", "reward_weights": {"mae": "x"}}, "reward_weights=.*expected numbers"),
        ({"world": "libero-small", "device": "gpu"}, r"device='gpu': allowed here are \['auto'"),
        ({"world": "libero-small", "device": "cuda:99"}, "device='cuda:99': allowed here are"),
        ({"output": "jax"}, "output='jax'"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"horizon": 0}, "horizon=0"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
        ({"action_chunk": 0}, "action_chunk=0"),
        ({"reward": "R4"}, "reward='R4'"),
        ({"reward_weights": {"mae": 1.0}}, "not with a function"),
        ({"autoreset_mode": "Sometimes"}, "autoreset_mode='Sometimes'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"lpips_net": "squeeze"}, "lpips_net='squeeze': allowed are 'alex' and 'vgg'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_objects_of_wrong_type():
    with pytest.raises(TypeError, match=r"wmgym\.worlds\.world\.World"):
        make(world=3)
    world = ToyWorld()
    del world.context
    with pytest.raises(TypeError, match=r"lacks \['context'\]"):
        make(world=world)
    with pytest.raises(TypeError, match=r"wmgym\.data\.episodes\.Dataset"):
        make(dataset=3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (np.zeros((4, 1)), r"numpy.ndarray'>, expected \(n, F\) = \(4, 1\) in a tensor"),
        (0.5, "returned <class 'float'>, expected"),
        ((0.5, 0.5), "returned <class 'tuple'>, expected"),
        (torch.full((4, 1), torch.nan), "returned NaN or infinity"),
    ],
)
def test_what_a_reward_function_returns_is_checked(reward, message):
    env = make(reward=lambda inputs: reward)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions_of(env))


def test_max_episode_steps_counts_environment_steps():
    env = make(1, horizon=8, action_chunk=2, max_episode_steps=3)
    env.reset(seed=0)
    ends = [bool(env.step(actions_of(env, t))[3][0]) for t in range(3)]
    assert ends == [False, False, True]


def test_close_can_be_repeated():
    env = make(2)
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step(actions_of(env))
