"""Finite scalar quantisation against the definition, digit by digit."""

from __future__ import annotations

import math

import pytest
import torch

from wmgym.worlds.tokens.fsq import FSQ, LEVELS


@pytest.mark.parametrize("levels", LEVELS.values(), ids=str)
def test_every_code_comes_back(levels):
    fsq = FSQ(levels)
    codes = torch.arange(fsq.codes)
    vectors = fsq.decode(codes)
    assert vectors.shape == (fsq.codes, len(levels))
    assert len(vectors.unique(dim=0)) == fsq.codes
    assert vectors.min() >= -1
    assert vectors.max() <= 1
    half = torch.tensor([n // 2 for n in levels])
    shift = torch.tensor([0.5 if n % 2 == 0 else 0.0 for n in levels])
    reach = torch.tensor([(n - 1) * 1.001 / 2 for n in levels])
    inverse = torch.atanh((vectors * half + shift) / reach) - torch.atanh(shift / reach)
    assert torch.equal(fsq.encode(inverse), codes)
    torch.testing.assert_close(fsq.quantize(inverse), vectors)


def test_the_first_number_is_the_fastest_digit():
    fsq = FSQ((7, 5, 5, 5, 5))
    assert fsq.codes == 4375
    least = torch.full((5,), -9.0)
    assert fsq.encode(least) == 0
    steps = [1, 7, 35, 175, 875]
    for i, step in enumerate(steps):
        raised = least.clone()
        raised[i] = 9.0
        assert fsq.encode(raised) == step * (fsq.levels[i] - 1)


def test_an_offset_of_all_codes_decodes_to_the_same():
    """What the released code relies on when it decodes context tokens with their offset."""
    fsq = FSQ(LEVELS[12])
    codes = torch.arange(fsq.codes)
    assert torch.equal(fsq.decode(codes), fsq.decode(codes + fsq.codes))


def test_gradients_pass_straight_through():
    fsq = FSQ((7, 5))
    latents = torch.tensor([[0.3, -0.2]], requires_grad=True)
    fsq.quantize(latents).sum().backward()
    reach = torch.tensor([6 * 1.001 / 2, 4 * 1.001 / 2])
    slope = (1 - torch.tanh(latents.detach()) ** 2) * reach / torch.tensor([3.0, 2.0])
    torch.testing.assert_close(latents.grad, slope)
    assert not math.isclose(float(latents.grad[0, 0]), 1.0)
