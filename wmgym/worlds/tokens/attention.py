"""Attention of rows that share a prefix, and of whole sequences.

Rows of a start attend to the same keys and values before they attend to their own, so their queries
are stacked into one matrix for the prefix, which is read once per start and not once per row:

    softmax([Q_start K_prefix^T, q_row K_row^T]) [V_prefix; V_row]

Shapes: `B = N G` rows of `N` starts, `m` new tokens of a row, `P` tokens of a prefix, `S` own
tokens, `H_q` heads of queries, `H` of keys and values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from wmgym.extras import MissingExtraError
from wmgym.worlds.tokens.products import multiply

AttentionKind = Literal["auto", "sdpa", "flash", "flex"]
Causal: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of queries, keys and values `(B, L, heads, head)`, to the same shape."""


def shared_prefix_attention(
    q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], allowed: Tensor
) -> Tensor:
    """What rows see of their start's prefix and of their own tokens.

    Args:
        q: `(B, m, H_q, head)`, the rows of a start one after the other.
        prefix: Keys and values `(N, H, P, head)`.
        own: Keys and values `(B, H, S, head)`, of any precision.
        allowed: `(m, S)` bool, which own tokens each new one may see; the prefix is always seen.

    Returns:
        `(B, m, H_q head)` in the precision of `q`.
    """
    (keys, values), (own_keys, own_values) = prefix, own
    batch, count, q_heads, head = q.shape
    starts, heads, length = keys.shape[:3]
    each, members = q_heads // heads, batch // starts
    lines = count * each  # queries of a row that share a head of keys
    q = q.view(batch, count, heads, each, head).transpose(1, 2).reshape(batch, heads, lines, head)
    q = q * head**-0.5
    to_prefix = multiply(_by_start(q, starts), keys.transpose(-1, -2))
    to_own = q.to(own_keys.dtype) @ own_keys.transpose(-1, -2)
    to_own = to_own.masked_fill(~allowed.repeat_interleave(each, 0), -torch.inf)
    scores = torch.cat([_by_row(to_prefix, members).float(), to_own.float()], -1)
    weights = scores.softmax(-1)
    of_prefix = multiply(_by_start(weights[..., :length].to(values.dtype), starts), values)
    of_own = weights[..., length:].to(own_values.dtype) @ own_values
    mixed = _by_row(of_prefix, members).to(q.dtype) + of_own.to(q.dtype)
    mixed = mixed.view(batch, heads, count, each, head).transpose(1, 2)
    return mixed.reshape(batch, count, q_heads * head)


def _by_start(x: Tensor, starts: int) -> Tensor:
    """`(N G, H, l, d)` to `(N, H, G l, d)`."""
    return x.unflatten(0, (starts, -1)).transpose(1, 2).flatten(2, 3)


def _by_row(x: Tensor, members: int) -> Tensor:
    """The inverse of `_by_start`."""
    return x.unflatten(2, (members, -1)).transpose(1, 2).flatten(0, 1)


def causal_attention(kind: AttentionKind) -> Causal:
    """Causal attention over whole sequences by one of several kernels.

    Args:
        kind: "sdpa" is PyTorch's own and "auto". "flash" is the package flash-attn (2 or 4, on
            CUDA in half precision), "flex" PyTorch's FlexAttention.

    Raises:
        ValueError: Unknown kind.
        MissingExtraError: "flash" without the package.
    """
    if kind not in get_args(AttentionKind):
        raise ValueError(f"attention={kind!r}: allowed are {get_args(AttentionKind)}")
    if kind == "flash":
        return _flash(_flash_attention())
    return _flex if kind == "flex" else _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    each = q.shape[1] // k.shape[1]
    if each > 1:
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    length = q.shape[2]
    mask = create_block_mask(earlier, None, None, length, length, device=str(q.device))
    grouped = q.shape[1] != k.shape[1]
    kernel: Any = torch.compile(flex_attention) if q.is_cuda else flex_attention
    return kernel(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _flash(function: Callable[..., Any]) -> Causal:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q, k, v, causal=True)
        return found[0] if isinstance(found, tuple) else found  # version 4 adds the logsumexp

    return causal


def _flash_attention() -> Any:
    """`flash_attn_func` of version 2 or 4, which take `(B, L, heads, head)`.

    Version 4 installs only a part of the same name space, so the functions are asked for and not
    the package.
    """
    for module in ("flash_attn", "flash_attn.cute"):
        try:
            return importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
    raise MissingExtraError(
        "attention='flash' needs flash-attn: pip install --no-build-isolation "
        "'wmgym[flash-attn]', or flash-attn-4"
    )
