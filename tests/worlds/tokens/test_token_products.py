"""Products with frozen matrices: right, and the same for a row whatever else there is."""

from __future__ import annotations

import pytest
import torch

from wmgym.worlds.tokens.attention import shared_prefix_attention
from wmgym.worlds.tokens.products import multiply, product

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [1, 2, 3, 4, 5, 16, 18, 33, 64]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2304), (3072, 768)])  # published widths
def test_a_product_of_a_row_does_not_depend_on_the_others(dtype, inputs, outputs):
    linear = product(draw(outputs, inputs, dtype=dtype) * inputs**-0.5)
    rows = draw(64, 1, inputs, dtype=dtype, seed=1)
    together = linear(rows[:17])
    for count in COUNTS:
        some = linear(rows[:count])
        assert some.shape == (count, 1, outputs)
        assert torch.equal(some[:17], together[:count])
    assert torch.equal(linear(rows[0, 0]), together[0, 0])


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_products_are_right(rows):
    weight, x = draw(6, 10), draw(rows, 10, seed=1)
    torch.testing.assert_close(product(weight)(x), x @ weight.T)
    torch.testing.assert_close(multiply(x, weight.T), x @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [1, 30, 300])
def test_attention_of_a_row_does_not_depend_on_the_others(dtype, own):
    heads, head, length, most = 12, 64, 1088, 64  # the published ones
    prefix = draw(1, heads, length, head, dtype=dtype), draw(1, heads, length, head, dtype=dtype)
    q = draw(most, 1, heads, head, dtype=dtype, seed=1)
    keys, values = draw(most, heads, own, head, seed=2), draw(most, heads, own, head, seed=3)
    allowed = torch.ones(1, own, dtype=torch.bool)

    def mixed(count):
        return shared_prefix_attention(q[:count], prefix, (keys[:count], values[:count]), allowed)

    together = mixed(17)
    for count in COUNTS:
        assert torch.equal(mixed(count)[:17], together[:count])
