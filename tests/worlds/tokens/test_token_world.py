"""The published world behind the `World` protocol and in the environment."""

from __future__ import annotations

import dataclasses
import logging
import os

import gymnasium as gym
import numpy as np
import pytest
import torch
from published_tiny import DYNAMICS, TOKENIZER, clips, dynamics, save, tokenizer, world

from wmgym.worlds import CompressiveTokenizer, TokenDynamics
from wmgym.worlds.tokens import token_world
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.sampling import Decoding
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.world import World, cat_rows, replace_rows


@pytest.fixture(scope="module")
def shared():
    return world()


def same(a, b):
    for name, value in a.tensors().items():
        if name == "proprio":  # a rotation goes through its axis and angle between chunks
            torch.testing.assert_close(value, b.tensors()[name])
        else:
            assert torch.equal(value, b.tensors()[name]), name


def test_it_is_a_world(shared):
    assert isinstance(shared, World)
    frames, proprio, actions = clips(2)
    state, seen = shared.step(shared.start(frames, proprio), actions)
    assert seen.frames.shape == (2, 8, 3, 32, 32)
    assert seen.frames.min() >= 0
    assert seen.frames.max() <= 1
    assert seen.frames[0, 0].std() > 0.01
    assert seen.proprio.shape == (2, 8, 8)
    assert state.memory.shape[1] == 0  # the segment is over, nothing of it is needed again
    assert state.steps.tolist() == [8, 8]


def test_frames_are_those_of_the_tokenizer_and_a_plain_pass(shared):
    """The layout of the sequence, from the frame to the first imagined one."""
    frames, proprio, actions = clips(1)
    context, first = shared.tokenizer.encode(frames.repeat(1, 2, 1, 1, 1))
    bins = ActionTokens().encode(actions) + 8750
    sequence = torch.cat([context[:, 0] + 4375, first[:, 0], bins[:, 0]], 1)
    codes = []
    for _ in range(16):
        code = dynamics().logits(sequence)[:, -1, :4375].argmax(-1)
        codes.append(code)
        sequence = torch.cat([sequence, code[:, None]], 1)
    expected = tokenizer().decode(context, torch.stack(codes, 1)[:, None])[:, 1]
    _, seen = shared.step(shared.start(frames, proprio), actions[:, :1])
    torch.testing.assert_close(seen.frames[:, 0], expected.clamp(0, 1))


def test_chunks_are_the_same_as_single_steps_beyond_the_horizon(shared):
    frames, proprio, actions = clips(2)
    actions = torch.cat([actions, actions.flip(1)], 1)[:, :11]
    expected_state, expected = shared.step(shared.start(frames, proprio), actions)
    state, drawn = shared.start(frames, proprio), []
    for count in (3, 1, 5, 2):
        done = sum(x.shape[1] for x in drawn)
        state, seen = shared.step(state, actions[:, done : done + count])
        drawn.append(seen.frames)
    assert torch.equal(torch.cat(drawn, 1), expected.frames)
    same(state, expected_state)
    assert state.steps.tolist() == [3, 3]
    assert state.memory.shape[1] == 3 * 23 - 1


def test_every_other_frame_is_the_same_frame(shared):
    frames, proprio, actions = clips(1)
    _, every = shared.step(shared.start(frames, proprio), actions)
    _, some = shared.step(shared.start(frames, proprio), actions, every=4)
    assert torch.equal(some.frames, every.frames[:, 3::4])
    with pytest.raises(ValueError, match="multiples"):
        shared.step(shared.start(frames, proprio), actions, every=3)


def test_rows_at_different_steps_go_on_as_if_alone(shared):
    frames, proprio, actions = clips(3)
    start = shared.start(frames, proprio)
    ahead, _ = shared.step(start, actions[:, :2])
    mixed = replace_rows(ahead, torch.tensor([1]), shared.select(start, torch.tensor([1])))
    assert mixed.memory.shape[1] == ahead.memory.shape[1]
    after, seen = shared.step(mixed, actions[:, 2:4])
    for row, state in ((0, ahead), (1, start), (2, ahead)):
        index = torch.tensor([row])
        alone, own = shared.step(shared.select(state, index), actions[index, 2:4])
        assert torch.equal(own.frames[0], seen.frames[row])
        count = alone.memory.shape[1]
        assert torch.equal(alone.memory[0], after.memory[row, :count])
    joined = cat_rows([shared.select(ahead, torch.tensor([0])), start])
    assert joined.steps.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("decoding", [Decoding(), Decoding("sample")], ids=["greedy", "sample"])
def test_equal_actions_give_equal_frames_in_any_company(decoding):
    one = world(decoding=decoding)
    frames, proprio, actions = clips(2)
    rows = torch.tensor([0, 0, 0, 1, 0])
    told = torch.stack([actions[0], actions[1], actions[0], actions[1], actions[1]])
    _, seen = one.step(one.select(one.start(frames, proprio), rows), told)
    assert torch.equal(seen.frames[0], seen.frames[2])
    assert torch.equal(seen.frames[1], seen.frames[4])
    assert not torch.equal(seen.frames[0], seen.frames[1])
    assert not torch.equal(seen.frames[1], seen.frames[3])


def test_the_seed_is_of_the_sample():
    frames, proprio, actions = clips(1)
    drawn = []
    for seed in (0, 0, 1):
        one = world(decoding=Decoding("sample", seed=seed))
        drawn.append(one.step(one.start(frames, proprio), actions[:, :1])[1].frames)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_does_not_fit_into_memory_is_done_in_parts(shared):
    frames, proprio, actions = clips(3)
    rows = torch.tensor([0, 1, 2, 0, 0, 1, 0])
    told = torch.cat([actions, actions.flip(0), actions[:1] * 0.5])[:, :2]
    _, expected = shared.step(shared.select(shared.start(frames, proprio), rows), told)
    row = shared.generator.nbytes(1, 1, 8)
    for share in (1.4, 2.0, 4.5):
        small = world(memory_gib=row * share / 2**30)
        _, seen = small.step(small.select(small.start(frames, proprio), rows), told)
        assert torch.equal(seen.frames, expected.frames)
    with pytest.raises(ValueError, match="not enough for one row"):
        world(memory_gib=row / 2**30)


def test_parts_are_of_one_shape_where_steps_are_captured(shared):
    frames, proprio, _ = clips(5)
    prefix = shared.start(frames, proprio).prefix
    fitting = 2.1 * shared.generator.nbytes(1, 2, 8) / 0.75
    small = world(memory_gib=fitting / 2**30)
    rows = torch.tensor([0, 1, 1, 2, 3, 4])
    shapes = [part.shape for part in small._parts(prefix[rows], 8)]
    assert shapes == [(2, 2), (2, 1), (1, 1)]
    small.generator.static = True
    parts = list(small._parts(prefix[rows], 8))
    assert [part.shape for part in parts] == [(2, 2)] * 3
    assert torch.cat(parts).unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_memory_that_caches_would_give_back_is_free(tmp_path, monkeypatch):
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:       9 kB\nMemFree:        1 kB\nMemAvailable:       3 kB\n")
    monkeypatch.setattr(token_world, "_MEMINFO", said)
    assert token_world._free_memory(torch.device("cpu")) == 3 * 1024
    said.unlink()
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert token_world._free_memory(torch.device("cpu")) == half


def test_frames_become_tokens_without_tf32(monkeypatch):
    one, flags = world(), []
    encode = one.tokenizer.encode_context

    def spied(frames):
        now = torch.backends.cudnn
        flags.append((now.enabled, now.benchmark, now.deterministic, now.allow_tf32))
        return encode(frames)

    monkeypatch.setattr(one.tokenizer, "encode_context", spied)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    frames, proprio, _ = clips(1)
    one.start(frames, proprio)
    one.redraw(frames[:, 0], frames, proprio.repeat(1, 2, 1))
    assert flags == [(True, True, True, False)] * 2
    assert torch.backends.cudnn.allow_tf32


def test_the_memory_it_plans_is_what_buffers_take(shared, caplog):
    frames, proprio, actions = clips(1)
    told = torch.cat([actions, actions.flip(1)])
    shared.step(shared.select(shared.start(frames, proprio), torch.tensor([0, 0])), told)
    cache = shared.generator._cache
    used = sum(t.nbytes for t in (cache.keys, cache.values, *cache.prefix))
    assert 0 <= shared.generator.nbytes(1, 2, 8) - used < 0.01 * used
    with caplog.at_level(logging.INFO):
        world()
    assert "starts of up to 16 rows are imagined at once" in caplog.text


def test_the_weights_it_counts_are_those_there_are(shared):
    expected = sum(w.nbytes for w in dynamics().parameters())
    assert shared.generator.weight_bytes == expected
    one, two = (shared.needed_gib(count, 4) for count in (4, 8))
    rows = shared.generator.nbytes(1, 5, 8) + 3.5 * 5 * 8 * 3 * 32 * 32 * 4
    assert two - one == pytest.approx(rows / 2**30)


def test_starts_that_come_up_again_are_not_computed_again(monkeypatch):
    one = world()
    frames, proprio, actions = clips(2)
    counted = []
    for owner, name in ((one.tokenizer, "encode_context"), (one.generator, "prefix")):
        original = getattr(owner, name)

        def counting(x, original=original, name=name):
            counted.append(name)
            return original(x)

        monkeypatch.setattr(owner, name, counting)
    for _ in range(3):
        one.step(one.start(frames, proprio), actions[:, :1])
    assert counted == ["encode_context"] * 2 + ["prefix"] * 2


def test_released_sampling_draws_foreign_tokens_as_the_nearest_code():
    free = world(decoding=Decoding("sample", restricted=False))
    frames, proprio, actions = clips(1)
    state, seen = free.step(free.start(frames, proprio), actions[:, :2])
    assert state.tokens.max() >= 4375  # random weights know no restriction
    assert torch.isfinite(seen.frames).all()


def test_bfloat16_draws_nearly_the_same(shared):
    frames, proprio, _ = clips(1)
    rough = world(dtype="bfloat16")
    state = shared.start(frames, proprio)
    assert torch.equal(state.prefix, rough.start(frames, proprio).prefix)
    tokens = torch.randint(4375, (1, 3, 16), generator=torch.Generator().manual_seed(0))
    one, other = (w._draw(state.prefix, tokens) for w in (shared, rough))
    assert (one - other).abs().mean() < 0.02


def test_networks_are_copied_once_and_left_as_they_are():
    parts = (CompressiveTokenizer(TOKENIZER).train(), TokenDynamics(DYNAMICS).train())
    one = TokenWorld(*parts, ActionTokens(), name="tiny")
    for part in parts:
        assert part.training
        assert all(weight.requires_grad for weight in part.parameters())
    assert one._decoder is one.tokenizer is not parts[0]


def test_wrong_shapes_are_refused(shared):
    frames, proprio, actions = clips(1)
    with pytest.raises(ValueError, match=r"frames have shape .* expected \(B, C, \*\(3, 32, 32\)"):
        shared.start(frames[..., :16], proprio)
    with pytest.raises(ValueError, match="proprio has shape"):
        shared.start(frames, proprio[..., :7])
    with pytest.raises(ValueError, match="actions have shape"):
        shared.step(shared.start(frames, proprio), actions[..., :6])
    with pytest.raises(ValueError, match="allowed are"):
        world(dtype="float16")
    short = dataclasses.replace(DYNAMICS, max_position_embeddings=100)
    with pytest.raises(ValueError, match="positions"):
        TokenWorld(tokenizer(), dynamics(short), ActionTokens(), name="short")


def test_r3_of_the_recorded_actions_is_0_in_the_environment(tmp_path, tiny_dataset):
    folder = save(tmp_path / "world")
    envs = gym.make_vec(
        "wmgym:WorldModel-LIBERO-v0",
        num_envs=6,
        group_size=3,
        world=folder,
        dataset=tiny_dataset,
        action_chunk=8,
        autoreset_mode="Disabled",
    )
    observation, info = envs.reset(seed=0)
    assert observation["image"].shape == (6, 32, 32, 3)
    actions = np.array(info["reference_action"])
    actions[2], actions[3] = -actions[2], actions[3] * 0.5
    _, reward, _, truncated, info = envs.step(actions)
    assert truncated.all()
    assert (reward[[0, 1, 4, 5]] == 0).all()
    assert (reward[[2, 3]] < -1e-3).all()
    assert info["proprio_source"][0] == "integrated"


def test_a_whole_episode_at_256_pixels(tmp_path):
    """The published picture size and sequence, with narrow networks."""
    config = dataclasses.replace(
        TOKENIZER,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        resolution=256,
    )
    env = gym.make(
        "wmgym:WorldModel-LIBERO-v0", world=str(save(tmp_path / "world", config)), action_chunk=4
    )
    observation, info = env.reset(seed=0)
    assert observation["image"].shape == (256, 256, 3)
    rewards = []
    ended = False
    while not ended:
        action = info["reference_action"] if not rewards else -info["reference_action"]
        observation, reward, _, ended, info = env.step(action)
        rewards.append(reward)
    assert len(rewards) == 2
    assert rewards[0] == 0
    assert rewards[1] < 0
