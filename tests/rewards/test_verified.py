"""The verified reward: the reference gives 0, more error gives less, batches change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data

from wmgym.rewards.perceptual import LPIPS
from wmgym.rewards.verified import (
    RewardWeights,
    action_reward,
    encode_reference,
    frame_distance,
    frame_reward,
)

R, T, SIZE = 3, 4, 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """`(R, T, 3, SIZE, SIZE)`: crops of a photo, no two alike."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255
    places = np.random.default_rng(0).integers(0, 512 - SIZE, (R * T, 2))
    stack = torch.stack([image[:, y : y + SIZE, x : x + SIZE] for y, x in places])
    return stack.unflatten(0, (R, T))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def lpips(request) -> LPIPS:
    return LPIPS(dtype=request.param, micro_batch=4)


def noisy(frames: torch.Tensor, deviation: float) -> torch.Tensor:
    noise = torch.randn(frames.shape, generator=generator())
    return (frames + deviation * noise).clamp(0, 1)


def test_reference_gives_exactly_zero_for_every_member_in_any_order(lpips, frames):
    reference = encode_reference(frames, lpips)
    rows = torch.tensor([2, 0, 0, 1, 2, 1, 1])
    value, terms = frame_reward(frames[rows].clone(), reference, lpips, RewardWeights(), rows)
    assert value.shape == (7, T)
    assert (value == 0).all()
    assert terms.keys() == {"mae", "lpips"}
    assert all((term == 0).all() for term in terms.values())


def test_lpips_alone_gives_exactly_zero_across_batches(lpips, frames):
    """The features themselves agree, without the shortcut for equal frames."""
    reference = encode_reference(frames, lpips)
    single = torch.stack([lpips.features(frame[None])[0] for frame in frames.flatten(0, 1)])
    assert torch.equal(single, reference.features.flatten(0, 1))


def test_more_noise_less_reward(lpips, frames):
    reference = encode_reference(frames, lpips)
    values = [
        frame_reward(noisy(frames, deviation), reference, lpips, RewardWeights())[0]
        for deviation in (0.0, 0.02, 0.05, 0.1, 0.2)
    ]
    assert (torch.stack(values).diff(dim=0) < 0).all()


def test_reward_is_the_formula(frames):
    lpips = LPIPS()
    x = noisy(frames, 0.1)
    weights = RewardWeights(mae=0.5, lpips=2.0)
    reference = encode_reference(frames, lpips)
    value, terms = frame_reward(x, reference, lpips, weights)
    mae = (x - frames).abs().mean((2, 3, 4))
    perceptual = lpips(x.flatten(0, 1), frames.flatten(0, 1)).unflatten(0, (R, T))
    torch.testing.assert_close(terms["mae"], mae)
    torch.testing.assert_close(terms["lpips"], perceptual)
    torch.testing.assert_close(value, -(0.5 * mae + 2.0 * perceptual))


def test_results_do_not_depend_on_the_batch(lpips, frames):
    x = noisy(frames, 0.1)
    reference = encode_reference(frames, lpips)
    whole = frame_distance(x, reference, lpips, RewardWeights())
    for i in range(R):
        row = torch.tensor([i])
        part = frame_distance(x[i : i + 1], reference, lpips, RewardWeights(), rows=row)
        for name, value in part.items():
            assert torch.equal(value[0], whole[name][i])


def test_without_lpips_only_pixels_count(frames):
    weights = RewardWeights(mae=2.0, lpips=0.0)
    reference = encode_reference(frames, None)
    assert reference.features is None
    value, terms = frame_reward(frames * 0.5, reference, None, weights)
    assert terms.keys() == {"mae"}
    torch.testing.assert_close(value, -2.0 * terms["mae"])
    same, _ = frame_reward(frames, reference, None, weights)
    assert (same == 0).all()


def test_distance_is_differentiable(frames):
    lpips = LPIPS(micro_batch=4)
    x = noisy(frames, 0.1).requires_grad_()
    frame_distance(x, encode_reference(frames, lpips), lpips, RewardWeights())[
        "total"
    ].sum().backward()
    assert (x.grad.abs().amax((2, 3, 4)) > 0).all()


def test_r1_is_minus_the_mean_absolute_difference():
    actions = torch.rand(5, T, 7, generator=generator()) * 2 - 1
    reference = torch.rand(5, T, 7, generator=generator(1)) * 2 - 1
    value, terms = action_reward(actions, reference)
    expected = np.abs(actions.numpy() - reference.numpy()).mean(-1)
    np.testing.assert_allclose(value.numpy(), -expected, rtol=1e-5)
    assert torch.equal(terms["action_l1"], -value)
    assert (action_reward(reference, reference)[0] == 0).all()
    for i in range(5):
        row, _ = action_reward(actions[i : i + 1], reference[i : i + 1])
        assert torch.equal(row[0], value[i])


@pytest.mark.parametrize("bad", [{"mae": -1.0}, {"lpips": float("nan")}, {"mae": 0, "lpips": 0}])
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights"):
        RewardWeights(**bad)


def test_bad_use_is_refused(frames):
    with pytest.raises(ValueError, match="expected"):
        action_reward(torch.zeros(2, 3, 7), torch.zeros(2, 1, 7))
    pixels = RewardWeights(lpips=0)
    reference = encode_reference(frames, None)
    with pytest.raises(ValueError, match="expected"):
        frame_distance(frames[0], reference, None, pixels)
    with pytest.raises(ValueError, match="sizes"):
        frame_distance(frames[..., 1:], reference, None, pixels)
    with pytest.raises(ValueError, match="one entry per row"):
        frame_distance(frames, reference, None, pixels, rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="steps"):
        frame_distance(frames[:, 1:], reference, None, pixels)
    with pytest.raises(ValueError, match="do not fit"):
        frame_distance(frames, reference, None, pixels, rows=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="needs LPIPS"):
        frame_distance(frames, reference, None, RewardWeights())
    with pytest.raises(ValueError, match="no LPIPS features"):
        frame_distance(frames, reference, LPIPS(), RewardWeights())
