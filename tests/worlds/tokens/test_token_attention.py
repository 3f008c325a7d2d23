"""Attention that shares a prefix against attention over everything, and the kernels."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from wmgym.extras import MissingExtraError
from wmgym.worlds.tokens.attention import causal_attention, shared_prefix_attention


@pytest.mark.parametrize("q_heads", [2, 6])
@pytest.mark.parametrize("count", [1, 3])
def test_a_shared_prefix_is_as_good_as_one_of_its_own(q_heads, count):
    torch_rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=torch_rng)

    starts, members, heads, width, length, own = 2, 3, 2, 8, 11, 7
    q = draw(starts * members, count, q_heads, width)
    prefix = draw(starts, heads, length, width), draw(starts, heads, length, width)
    rows = (
        draw(starts * members, heads, own, width),
        draw(starts * members, heads, own, width),
    )
    allowed = torch.arange(own) <= torch.arange(own - count, own)[:, None] - 1
    mixed = shared_prefix_attention(q, prefix, rows, allowed)
    keys, values = (
        torch.cat([p.repeat_interleave(members, 0), r], 2).repeat_interleave(q_heads // heads, 1)
        for p, r in zip(prefix, rows, strict=True)
    )
    seen = torch.cat([torch.ones(count, length, dtype=torch.bool), allowed], 1)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen)
    torch.testing.assert_close(mixed, expected.transpose(1, 2).flatten(2))


def inputs():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, 9, heads, 16, generator=rng) for heads in (4, 2, 2)]


def test_flex_is_the_same_as_sdpa():
    q, k, v = inputs()
    torch.testing.assert_close(
        causal_attention("flex")(q, k, v), causal_attention("sdpa")(q, k, v), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.cute"])
def test_flash_is_called_in_its_own_layout(monkeypatch, module):
    def flash_attn_func(q, k, v, causal):
        assert causal
        assert (q.shape, k.shape) == ((2, 9, 4, 16), (2, 9, 2, 16))
        out = causal_attention("sdpa")(q, k, v)
        return (out, torch.zeros(2, 4, 9)) if module == "flash_attn.cute" else out

    for name in ("flash_attn", "flash_attn.cute"):  # version 4 brings the second one alone
        fake = types.ModuleType(name)
        fake.__path__ = []
        if name == module:
            fake.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, name, fake)
    q, k, v = inputs()
    expected = causal_attention("auto")(q, k, v)
    assert torch.equal(causal_attention("flash")(q, k, v), expected)


def test_missing_and_unknown_kernels_are_named():
    with pytest.raises(MissingExtraError, match=r"wmgym\[flash-attn\]"):
        causal_attention("flash")
    with pytest.raises(ValueError, match="allowed are"):
        causal_attention("xformers")
