"""The promises of the `World` protocol, kept by `LatentWorld`: exact forks, independent rows."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from wmgym.worlds.dynamics import DynamicsConfig
from wmgym.worlds.latent_world import LatentState, LatentWorld, LatentWorldConfig, LatentWorldModel
from wmgym.worlds.tokenizer import TokenizerConfig
from wmgym.worlds.world import Prediction, World, replace_rows, select_rows

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def world(request) -> LatentWorld:
    return tiny.world(dtype=request.param)


@pytest.fixture(scope="module")
def exact() -> LatentWorld:
    return tiny.world()


def imagine(world, frames, proprio, actions, chunks=None) -> tuple[LatentState, Prediction]:
    """Steps through all actions in chunks of the given lengths."""
    state, parts = world.start(frames, proprio), []
    for chunk in actions.split(chunks or actions.shape[1], dim=1):
        state, prediction = world.step(state, chunk)
        parts.append(prediction)
    frames, proprio = (torch.cat([getattr(p, k) for p in parts], 1) for k in ("frames", "proprio"))
    return state, Prediction(frames, proprio)


def assert_same(one, other) -> None:
    """Bit for bit."""
    pairs = (vars(x).items() for x in (one, other))
    for (name, a), (_, b) in zip(*pairs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


def assert_close(one, other, tolerance: float) -> None:
    for (name, a), (_, b) in zip(vars(one).items(), vars(other).items(), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda m, n=name: n + m)


def test_is_a_world(world):
    assert isinstance(world, World)
    assert world.image_size == (tiny.SIZE, tiny.SIZE)
    assert (world.context, world.proprio_source, world.name) == (2, "learned", "tiny")


def test_predictions_are_pictures_and_readings_without_a_graph(world):
    state, prediction = imagine(world, *tiny.rows(3, 6))
    assert prediction.frames.shape == (3, 6, 3, tiny.SIZE, tiny.SIZE)
    assert prediction.proprio.shape == (3, 6, 8)
    assert prediction.frames.min() >= 0
    assert prediction.frames.max() <= 1
    for tensor in [*state.tensors().values(), prediction.frames, prediction.proprio]:
        assert torch.isfinite(tensor.float()).all()
        assert tensor.dtype in (torch.float32, torch.int64)
        assert not tensor.requires_grad
    assert not any(p.requires_grad for p in world.model.parameters())
    assert len(state) == 3


# --- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, [3, 1, 4, 2, 1], [5, 6], [4, 4, 3], 11])
def test_chunking_changes_nothing_even_past_the_horizon(exact, chunks):
    frames, proprio, actions = tiny.rows(2, 11)
    whole = imagine(exact, frames, proprio, actions)
    parts = imagine(exact, frames, proprio, actions, chunks)
    assert_close(parts[1], whole[1], 1e-5)
    assert_close(parts[0], whole[0], 1e-5)


@pytest.mark.parametrize("every", [2, 4])
def test_leaving_out_frames_changes_nothing_else(world, every):
    frames, proprio, actions = tiny.rows(6, 2 * world.horizon)
    state = world.start(frames, proprio)
    after, seen = world.step(state, actions)
    after_few, few = world.step(state, actions, every=every)
    assert_same(after, after_few)
    assert torch.equal(few.frames, seen.frames[:, every - 1 :: every])
    assert torch.equal(few.proprio, seen.proprio)
    with pytest.raises(ValueError, match="must be multiples of it"):
        world.step(state, actions[:, :1], every=every)


def test_after_the_horizon_the_last_imagined_frame_is_the_context(exact):
    frames, proprio, actions = tiny.rows(2, 2 * tiny.HORIZON)
    _, whole = imagine(exact, frames, proprio, actions)
    _, first = imagine(exact, frames, proprio, actions[:, : tiny.HORIZON])
    again = imagine(exact, first.frames[:, -2:], first.proprio[:, -2:], actions[:, tiny.HORIZON :])[
        1
    ]
    torch.testing.assert_close(again.frames, whole.frames[:, tiny.HORIZON :], atol=1e-5, rtol=0)
    torch.testing.assert_close(again.proprio, whole.proprio[:, tiny.HORIZON :], atol=1e-5, rtol=0)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 16, 33])
def test_a_row_does_not_depend_on_how_many_there_are(world, count):
    inputs = tiny.rows(17, 6)
    whole = imagine(world, *inputs)
    index = torch.arange(count) % 17
    part = imagine(world, *(x[index] for x in inputs))
    assert_same(part[1], Prediction(whole[1].frames[index], whole[1].proprio[index]))
    assert_same(part[0], select_rows(whole[0], index))


def test_passes_have_equally_many_rows_where_sums_depend_on_it(exact):
    """As on CUDA."""
    filled, counted = tiny.world(), []
    filled._rows_per_pass = 16
    filled.model.dynamics.register_forward_pre_hook(lambda _, given: counted.append(len(given[0])))
    for count in (1, 5, 17):
        inputs = tiny.rows(count, 6)
        assert_same(imagine(filled, *inputs)[1], imagine(exact, *inputs)[1])
    assert set(counted) == {16}


def test_permuting_rows_permutes_results(world):
    inputs = tiny.rows(17, 6)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    state, prediction = imagine(world, *inputs)
    permuted_state, permuted = imagine(world, *(x[order] for x in inputs))
    assert torch.equal(permuted.frames, prediction.frames[order])
    assert torch.equal(permuted.proprio, prediction.proprio[order])
    assert_same(permuted_state, select_rows(state, order))


def test_rows_at_different_steps_are_what_they_are_alone(world):
    frames, proprio, actions = tiny.rows(5, 9)
    taken = (0, 3, 4, 3, 6)
    states = []
    for row, count in enumerate(taken):
        one = [x[row : row + 1] for x in (frames, proprio, actions)]
        state = world.start(*one[:2])
        states.append(world.step(state, one[2][:, :count])[0] if count else state)
    mixed = LatentState(
        **{k: torch.cat([s.tensors()[k] for s in states]) for k in states[0].tensors()}
    )
    following = torch.stack([actions[row, n : n + 3] for row, n in enumerate(taken)])
    together_state, together = world.step(mixed, following)
    for row, state in enumerate(states):
        alone_state, alone = world.step(state, following[row : row + 1])
        assert torch.equal(together.frames[row], alone.frames[0])
        assert torch.equal(together.proprio[row], alone.proprio[0])
        assert_same(select_rows(together_state, torch.tensor([row])), alone_state)


def test_equal_actions_give_equal_frames(world):
    frames, proprio, actions = (x.expand(19, *x.shape[1:]) for x in tiny.rows(1, 6))
    prediction = imagine(world, frames, proprio, actions)[1]
    assert (prediction.frames == prediction.frames[:1]).all()
    assert (prediction.proprio == prediction.proprio[:1]).all()


def test_rows_of_the_default_shape_are_independent_too():
    config = LatentWorldConfig(TokenizerConfig(image_size=64), DynamicsConfig())
    inputs = tiny.rows(17, 1, size=64)
    for dtype in DTYPES:
        world = tiny.world(config, dtype=dtype)
        state, whole = imagine(world, *inputs)
        for count in (1, 2, 3):
            part_state, part = imagine(world, *(x[-count:] for x in inputs))
            assert torch.equal(part.frames, whole.frames[-count:]), (dtype, count)
            assert torch.equal(part.proprio, whole.proprio[-count:])
            assert torch.equal(part_state.coarse, state.coarse[-count:])


# --- forks --------------------------------------------------------------------------------------


def test_a_fork_equals_a_replay(world):
    frames, proprio, actions = tiny.rows(3, 7)
    state = world.step(world.start(frames, proprio), actions[:, :3])[0]
    index = torch.tensor([2, 0, 2, 1])
    fork = world.select(state, index)
    replay = world.step(world.start(frames[index], proprio[index]), actions[index, :3])[0]
    assert_same(fork, replay)
    assert_same(world.step(fork, actions[index, 3:])[1], world.step(replay, actions[index, 3:])[1])


def test_replaced_rows_go_on_as_where_they_came_from(world):
    frames, proprio, actions = tiny.rows(4, 5)
    state = world.step(world.start(frames, proprio), actions[:, :2])[0]
    fresh = world.start(frames[:2], proprio[:2])
    mixed = replace_rows(state, torch.tensor([3, 1]), fresh)
    prediction = world.step(mixed, actions[:, 2:])[1]
    kept = world.step(state, actions[:, 2:])[1]
    new = world.step(fresh, actions[[3, 1], 2:])[1]
    assert torch.equal(prediction.frames[[0, 2]], kept.frames[[0, 2]])
    assert torch.equal(prediction.frames[[3, 1]], new.frames)


def test_states_are_never_written_to(world):
    frames, proprio, actions = tiny.rows(2, 9)
    state = world.start(frames, proprio)
    for chunk in actions.split(3, dim=1):
        before = {name: value.clone() for name, value in state.tensors().items()}
        following, _ = world.step(state, chunk)
        replace_rows(state, torch.tensor([0]), world.select(following, torch.tensor([1])))
        assert all(torch.equal(before[k], v) for k, v in state.tensors().items())
        state = following


# --- what depends on what -----------------------------------------------------------------------


@pytest.mark.parametrize("changed", range(6))
def test_an_action_changes_what_follows_it_and_nothing_before(world, changed):
    frames, proprio, actions = tiny.rows(2, 6)
    other = actions.clone()
    other[:, changed] = -other[:, changed]
    one = imagine(world, frames, proprio, actions)[1]
    two = imagine(world, frames, proprio, other)[1]
    for name in ("frames", "proprio"):
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a[:, :changed], b[:, :changed])
        differs = (a != b).flatten(2).any(-1)
        assert differs[:, changed:].all()


def test_only_the_last_frame_and_the_last_two_readings_count(exact):
    frames, proprio, actions = tiny.rows(2, 3)
    expected = imagine(exact, frames, proprio, actions)[1]
    longer = torch.cat([1 - frames, frames], 1), torch.cat([proprio + 9, proprio], 1)
    assert_same(imagine(exact, *longer, actions)[1], expected)
    changed = torch.stack([1 - frames[:, 0], frames[:, 1]], 1)
    assert_same(imagine(exact, changed, proprio, actions)[1], expected)
    for reading in (0, 1):
        moved = proprio.clone()
        moved[:, reading] += 0.1
        assert not torch.equal(imagine(exact, frames, moved, actions)[1].frames, expected.frames)


def test_a_single_context_frame_stands_for_an_arm_at_rest(exact):
    frames, proprio, actions = tiny.rows(2, 3)
    single = imagine(exact, frames[:, 1:], proprio[:, 1:], actions)[1]
    twice = imagine(exact, frames, proprio[:, 1:].expand(-1, 2, -1), actions)[1]
    assert_same(single, twice)


def test_an_untrained_world_almost_copies():
    config = LatentWorldConfig(tiny.CONFIG.tokenizer, tiny.CONFIG.dynamics)
    world = LatentWorld(tiny.model(config, lively=0.0), name="untrained")
    frames, proprio, actions = tiny.rows(4, tiny.HORIZON)
    prediction = imagine(world, frames, proprio, actions)[1]
    off = (prediction.frames - frames[:, 1:]).abs()
    assert off.mean() < 0.04
    assert off.max() < 0.15
    copied = proprio[:, 1:].expand(-1, tiny.HORIZON, -1)
    torch.testing.assert_close(prediction.proprio, copied, atol=0, rtol=0)


def test_redrawing_is_decoding_what_was_encoded(exact):
    frames, proprio, _ = tiny.rows(3, 1)
    more, later, _ = tiny.rows(3, 1, seed=1)
    tokenizer = exact.model.tokenizer
    drawn = exact.redraw(frames[:, 0], more, torch.cat([proprio[:, :1], later], 1))
    assert drawn.shape == (3, 2, 3, tiny.SIZE, tiny.SIZE)
    assert not drawn.requires_grad
    seen = tokenizer.look(frames[:, 0])
    for t in range(2):
        latents = tokenizer.encode(tokenizer.look(more[:, t]), seen)
        pose = exact.model.dynamics.pose(proprio[:, 0], later[:, t])
        expected = tokenizer.decode(latents, pose, seen, frames[:, 0]).clamp(0, 1)
        torch.testing.assert_close(drawn[:, t], expected, atol=1e-5, rtol=0)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "proprio"),
    [
        ((2, 2, 3, 16, 16), (2, 2, 8)),
        ((2, 2, tiny.SIZE, tiny.SIZE, 3), (2, 2, 8)),
        ((2, 3, tiny.SIZE, tiny.SIZE), (2, 2, 8)),
        ((2, 0, 3, tiny.SIZE, tiny.SIZE), (2, 0, 8)),
        ((2, 2, 3, tiny.SIZE, tiny.SIZE), (1, 2, 8)),
        ((2, 2, 3, tiny.SIZE, tiny.SIZE), (2, 1, 8)),
        ((2, 2, 3, tiny.SIZE, tiny.SIZE), (2, 2, 7)),
        ((2, 2, 3, tiny.SIZE, tiny.SIZE), (2, 8)),
    ],
)
def test_start_refuses_wrong_shapes(exact, frames, proprio):
    with pytest.raises(ValueError, match="expected"):
        exact.start(torch.zeros(frames), torch.zeros(proprio))


@pytest.mark.parametrize(
    "shape", [(2, 7), (1, 3, 7), (3, 3, 7), (2, 3, 6), (2, 0, 7), (2, 1, 3, 7)]
)
def test_step_refuses_wrong_shapes(exact, shape):
    state = exact.start(*tiny.rows(2, 1)[:2])
    with pytest.raises(ValueError, match=r"expected \(2, T, 7\)"):
        exact.step(state, torch.zeros(shape))


def test_unknown_dtype_and_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="float16"):
        tiny.world(dtype="float16")
    with pytest.raises(ValueError, match=r"image_size=30.*patch=4"):
        TokenizerConfig(image_size=30, patch=4)
    broken = dataclasses.replace(tiny.CONFIG.tokenizer, heads=3)
    with pytest.raises(ValueError, match="heads=3"):
        LatentWorldModel(dataclasses.replace(tiny.CONFIG, tokenizer=broken))


def test_dynamics_refuse_more_actions_than_their_horizon(exact):
    frames, proprio, actions = tiny.rows(2, tiny.HORIZON + 1)
    dynamics = exact.model.dynamics
    coarse = exact.model.tokenizer.look(frames[:, 1]).coarse
    with pytest.raises(ValueError, match=f"horizon is {tiny.HORIZON}"):
        dynamics(coarse, proprio, actions)
    whole = dynamics(coarse, proprio, actions[:, :-1])
    part = dynamics(coarse, proprio, actions[:, :2])
    for a, b in zip(part, whole, strict=True):
        torch.testing.assert_close(a, b[:, :2], atol=1e-5, rtol=0)
