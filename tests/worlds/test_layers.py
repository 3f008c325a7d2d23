"""Blocks of the small world against independent computations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from wmgym.worlds.layers import (
    Attention,
    GridBlock,
    TokenBlock,
    from_patches,
    merge,
    modulate,
    split,
    to_patches,
    warp,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", [2, 4, 6])
def test_merge_joins_neighbours_and_split_undoes_it(side):
    grid = noise(3, side, side, 5)
    merged = merge(grid.flatten(1, 2)).view(3, side // 2, side // 2, 20)
    for y in range(side // 2):
        for x in range(side // 2):
            patch = grid[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)
            assert torch.equal(merged[:, y, x], patch)
    assert torch.equal(split(merged.flatten(1, 2)), grid.flatten(1, 2))
    assert torch.equal(merge(split(merged.flatten(1, 2))), merged.flatten(1, 2))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_hold_their_pixels_and_are_undone(patch):
    images = noise(2, 3, 8, 8)
    tokens = to_patches(images, patch)
    across = 8 // patch
    assert tokens.shape == (2, across**2, 3 * patch**2)
    for number in range(across**2):
        y, x = divmod(number, across)
        pixels = images[:, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
        assert torch.equal(tokens[:, number], pixels.flatten(1))
    assert torch.equal(from_patches(tokens, patch), images)


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (1, 0), (0, 2), (-3, 1), (2, -2)])
def test_warp_with_a_constant_flow_of_whole_pixels_shifts_the_image(dy, dx):
    images = noise(2, 3, 12, 9)
    flow = torch.tensor([float(dy), float(dx)]).view(1, 2, 1, 1).expand(2, 2, 12, 9)
    ys, xs = (torch.arange(12) + dy).clamp(0, 11), (torch.arange(9) + dx).clamp(0, 8)
    torch.testing.assert_close(warp(images, flow), images[:, :, ys][..., xs], atol=1e-5, rtol=0)


def test_warp_is_bilinear_and_its_own_for_every_pixel_and_row():
    images = noise(2, 1, 6, 6)
    flow = torch.zeros(2, 2, 6, 6)
    flow[1, 0, 2, 3], flow[1, 1, 2, 3] = 0.25, -0.5
    warped = warp(images, flow)
    source = images[1, 0]
    upper, lower = (source[2, 2] + source[2, 3]) / 2, (source[3, 2] + source[3, 3]) / 2
    assert warped[1, 0, 2, 3].item() == pytest.approx((0.75 * upper + 0.25 * lower).item())
    warped[1, 0, 2, 3] = source[2, 3]
    torch.testing.assert_close(warped, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_pytorchs_own(masked):
    layer = Attention(12, 3)
    x, memory = noise(2, 5, 12), noise(2, 5, 12, seed=1)
    mask = torch.ones(5, 5).tril().bool() if masked else None
    q, (k, v) = layer.query(x), layer.key_value(memory).chunk(2, dim=-1)
    heads = [t.view(2, 5, 3, 4).transpose(1, 2) for t in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    expected = layer.out(mixed.transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(layer(x, memory, mask), expected)


def test_masked_tokens_change_nothing_at_all():
    layer = Attention(8, 2)
    x, other = noise(1, 4, 8), noise(1, 4, 8)
    other[:, 2:] = 100.0
    mask = torch.ones(4, 4).tril().bool()
    assert torch.equal(layer(x, x, mask)[:, :2], layer(other, other, mask)[:, :2])
    assert not torch.equal(layer(x, x)[:, :2], layer(other, other)[:, :2])


def test_attention_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"width=10.*heads=4"):
        Attention(10, 4)


def test_token_block_needs_memory_where_it_crosses_over():
    x, memory = noise(2, 3, 8), noise(2, 7, 8, seed=1)
    with pytest.raises(ValueError, match="memory"):
        TokenBlock(8, 2, cross=True)(x)
    block = TokenBlock(8, 2, cross=True)
    assert block(x, memory).shape == x.shape
    assert not torch.equal(block(x, memory), block(x, memory + 1 * noise(2, 7, 8, seed=2)))
    alone = TokenBlock(8, 2, cross=False)
    assert torch.equal(alone(x, memory), alone(x))


@pytest.mark.parametrize(
    "block", [TokenBlock(8, 2, cross=False, conditioned=True), GridBlock(8, condition=8)]
)
def test_a_condition_changes_its_own_row(block):
    x, condition = noise(2, 4, 8), noise(2, 8, seed=1)
    with pytest.raises(ValueError, match="condition"):
        block(x)
    other = condition.clone()
    other[1] += 1
    one, two = block(x, condition=condition), block(x, condition=other)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_modulation_scales_and_shifts_each_feature():
    x, scale, shift = noise(2, 4, 3), noise(2, 3, seed=1), noise(2, 3, seed=2)
    assert torch.equal(modulate(x, 0 * scale, 0 * shift), x)
    modulated = modulate(x, scale, shift)
    for row in range(2):
        torch.testing.assert_close(modulated[row], x[row] * (1 + scale[row]) + shift[row])


def test_grid_block_sees_the_eight_neighbours_of_a_token_and_no_more():
    block = GridBlock(4)
    grid = noise(1, 36, 4).requires_grad_()
    block(grid).view(6, 6, 4)[2, 3].sum().backward()
    assert grid.grad is not None
    seen = grid.grad.view(6, 6, 4).abs().sum(-1) > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen, expected)
