"""Fast generation of frames' tokens, written for the structure of the problem.

All members of a group and their reference begin with the same 1,088 of 1,095 tokens. The prefix is
passed once per start and attended to as one: the queries of all rows that share it are one matrix.
What each row adds goes into buffers that are never copied; the actions of a step go in as one pass;
only the tokens that may come next are scored. On CUDA the step is captured in a graph.

    logits of a row = f(prefix of its start, what it added)

Rows are laid out in `N` starts of `G` members. A row's result does not depend on others': with
sampling, noise is a hash of seed, start and place (`noise.py`), the same for all rows of a start.

Shapes: `B = N G` rows, `P` tokens of a prefix, `S` tokens added, `H` heads, `n` tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.worlds.tokens.noise import combine, gumbel
from wmgym.worlds.tokens.products import Product, product
from wmgym.worlds.tokens.transformer import TokenDynamics, rms_norm, rotary, rotate
from wmgym.worlds.tokens.vocabulary import Vocabulary

Mode = Literal["greedy", "sample"]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        mode: "greedy", or "sample" from the softmax.
        top_p: Sampling keeps the likeliest tokens that together have at least this probability.
        temperature: Divides the logits.
        restricted: Only dynamics codes may follow. Otherwise, as released, any id may; ids that are
            no dynamics codes stay in the sequence and are drawn as the nearest code.
        seed: Of the noise.

    Raises:
        ValueError: A value outside of its range.
    """

    mode: Mode = "greedy"
    top_p: float = 0.8
    temperature: float = 1.0
    restricted: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r}: allowed are {get_args(Mode)}")
        if not 0 < self.top_p <= 1 or not self.temperature > 0:
            raise ValueError(
                f"top_p={self.top_p}, temperature={self.temperature}: allowed are (0, 1] and > 0"
            )


GREEDY = Decoding()


def choose(logits: Tensor, decoding: Decoding, keys: Tensor) -> Tensor:
    """Next tokens `(B,)` of logits `(B, V)`; `keys` `(B,)` name the noise of rows and place."""
    if decoding.mode == "greedy":
        return logits.argmax(dim=-1)
    scaled = logits.float() / decoding.temperature
    if decoding.top_p < 1:
        ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, before >= decoding.top_p
        )
        scaled = scaled.masked_fill(beyond, -torch.inf)
    return (scaled + gumbel(keys, scaled.shape[1])).argmax(dim=-1)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens that rows of a start share.

    Attributes:
        keys: `(layers, N, H, P, head)`.
        values: The same.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def join(cls, parts: Sequence[Prefix]) -> Prefix:
        """The starts of several."""
        return cls(torch.cat([p.keys for p in parts], 1), torch.cat([p.values for p in parts], 1))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer, with those that read the same input joined."""

    before: Tensor
    qkv: Product
    out: Product
    between: Tensor
    gate_up: Product
    down: Product


class Generator:
    """Continues the sequences of starts; see the module docstring.

    Args:
        dynamics: The network, frozen.
        vocabulary: Its tokens.
        decoding: How the next token is chosen.
        dtype: Arithmetic of the matrix products; norms, softmax and choices are float32.
    """

    def __init__(
        self,
        dynamics: TokenDynamics,
        vocabulary: Vocabulary,
        decoding: Decoding,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = dynamics.config
        self.config, self.vocabulary, self.decoding, self.dtype = (
            config,
            vocabulary,
            decoding,
            dtype,
        )
        self.device = dynamics.lm_head.weight.device
        # Rows read what they added once per token, which is bound by memory; yet the kernels for
        # one query are slower in bfloat16 on a CPU.
        self.added_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.q_heads, self.heads, self.head = (
            config.num_attention_heads,
            config.kv_heads,
            config.head_width,
        )
        self.embedding = dynamics.model.embed_tokens.weight.to(dtype)
        self.norm = dynamics.model.norm.weight.to(dtype)
        allowed = vocabulary.dynamics if decoding.restricted else config.vocab_size
        self.unembed = product(dynamics.lm_head.weight[:allowed].to(dtype))

        def joined(*parts: nn.Linear) -> Product:
            return product(torch.cat([part.weight for part in parts]).to(dtype))

        layers: Any = dynamics.model.layers
        self.layers = [
            _Layer(
                layer.input_layernorm.weight.to(dtype),
                joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                joined(layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight.to(dtype),
                joined(layer.mlp.gate_proj, layer.mlp.up_proj),
                joined(layer.mlp.down_proj),
            )
            for layer in layers
        ]
        self._work: _Work | None = None

    def nbytes(self, starts: int, members: int, steps: int) -> int:
        """Bytes of keys and values of `starts` prefixes and of `steps` frames of every row."""
        each = 2 * len(self.layers) * self.heads * self.head
        added = members * steps * self.vocabulary.frame * self.added_dtype.itemsize
        return starts * each * (self.vocabulary.prefix * self.dtype.itemsize + added)

    @torch.no_grad()
    def prefix(self, tokens: Tensor) -> Prefix:
        """Passes prefixes `(N, P)`, one at a time: what comes out depends on nothing else."""
        keys, values = [], []
        for row in tokens.split(1):
            k, v = self._whole(row)
            keys.append(k)
            values.append(v)
        return Prefix(torch.cat(keys, 1), torch.cat(values, 1))

    def no_memory(self, rows: int) -> Tensor:
        """The memory `(B, 0, ...)` of rows that have added nothing yet."""
        width = 2 * len(self.layers) * self.heads * self.head
        return torch.zeros(rows, 0, width, dtype=self.added_dtype, device=self.device)

    @torch.no_grad()
    def generate(
        self,
        prefix: Prefix,
        members: int,
        actions: Tensor,
        noise: Tensor,
        *,
        past: tuple[Tensor, Tensor] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Imagines frames.

        Args:
            prefix: Of `N` starts.
            members: Rows `G` of every start, in order.
            actions: `(B, T, 7)` tokens.
            noise: `(B,)` keys of the rows' noise.
            past: Tokens `(B, t, n)` of the `t >= 1` frames imagined so far and the memory of them;
                None at the start.
            keep: Whether the rows go on, so that their memory is needed.

        Returns:
            Tokens `(B, T, n)`, and the memory `(B, S, ...)` of `S = (t + T) (n + 7) - 1` tokens, or
            of none.
        """
        frame, taken, at, last = self.vocabulary.frame, 0, 0, None
        if past is not None:
            taken, last = past[0].shape[1], past[0][:, -1, -1:]
            at = taken * frame - 1
        work = self._workspace(prefix, members, (taken + actions.shape[1]) * frame - 1)
        if past is not None:
            work.put(past[1][:, :at])
        frames = []
        for number, action in enumerate(actions.unbind(1), taken):
            told = action if last is None else torch.cat([last, action], 1)
            tokens = self._frame(work, told, at, combine(noise, number))
            at, last = (number + 1) * frame - 1, tokens[:, -1:]
            frames.append(tokens)
        return torch.stack(frames, 1), work.take(at if keep else 0)

    def _frame(self, work: _Work, told: Tensor, at: int, noise: Tensor) -> Tensor:
        """The `n` tokens `(B, n)` of a frame after the tokens `told` `(B, m)` at place `at`."""
        count = self.vocabulary.dynamics_tokens
        hidden = self._pass(work, told, at)
        tokens = [self._next(hidden, combine(noise, 0))]
        at += told.shape[1]
        for place in range(1, count):
            hidden = self._pass(work, tokens[-1][:, None], at)
            tokens.append(self._next(hidden, combine(noise, place)))
            at += 1
        return torch.stack(tokens, 1)

    def _next(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return choose(self.unembed(hidden), self.decoding, noise)

    def _workspace(self, prefix: Prefix, members: int, length: int) -> _Work:
        """Buffers for rows of a prefix; those of the last call if they fit."""
        shape = (prefix.keys.shape, members)
        work = self._work
        if work is None or work.shape != shape or work.length < length:
            self._work = None  # free before the next are made
            work = self._work = _Work(self, prefix, members, length)
        work.prefix = prefix
        return work

    def _pass(self, work: _Work, tokens: Tensor, at: int) -> Tensor:
        """Adds tokens `(B, m)` at place `at`; returns hidden states `(B, D)` of the last."""
        count = tokens.shape[1]
        places = torch.arange(at, at + count, device=self.device)
        cos, sin = rotary(work.prefix_length + places, self.head, self.config.rope_theta)
        cos, sin = cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
        end = at + count
        later = torch.arange(end, device=self.device) > places[:, None] if count > 1 else None
        x = F.embedding(tokens, self.embedding)
        eps = self.config.rms_norm_eps
        for number, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            work.keys[number][:, :, at:end] = k.transpose(1, 2)
            work.values[number][:, :, at:end] = v.transpose(1, 2)
            mixed = self._attend(work, number, q, end, later)
            x = x + layer.out(mixed)
            x = x + self._mlp(layer, rms_norm(x, layer.between, eps))
        return rms_norm(x[:, -1], self.norm, eps)

    def _attend(
        self, work: _Work, number: int, q: Tensor, end: int, later: Tensor | None
    ) -> Tensor:
        """Attention of `q` `(B, m, H_q, head)` to prefix and additions: `(B, m, H_q head)`."""
        batch, count = q.shape[:2]
        starts, members = work.starts, work.members
        each = self.q_heads // self.heads
        q = q.view(batch, count, self.heads, each, self.head) * self.head**-0.5
        shared = q.view(starts, members, count, self.heads, each, self.head)
        shared = shared.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)
        own = q.permute(0, 2, 1, 3, 4).flatten(2, 3).to(self.added_dtype)
        keys, values = work.prefix.keys[number], work.prefix.values[number]
        added_keys, added_values = work.keys[number][:, :, :end], work.values[number][:, :, :end]
        to_prefix = (shared @ keys.transpose(-1, -2)).view(
            starts, self.heads, members, count * each, -1
        )
        to_own = own @ added_keys.transpose(-1, -2)
        if later is not None:
            mask = later.repeat_interleave(each, 0)
            to_own = to_own.masked_fill(mask, -torch.inf)
        to_prefix = to_prefix.transpose(1, 2).flatten(0, 1)
        weights = torch.cat([to_prefix.float(), to_own.float()], -1).softmax(-1)
        length = keys.shape[2]
        of_prefix = (
            weights[..., :length]
            .to(self.dtype)
            .view(starts, members, self.heads, count * each, length)
        )
        of_prefix = of_prefix.transpose(1, 2).flatten(2, 3) @ values
        of_prefix = of_prefix.view(starts, self.heads, members, count * each, self.head)
        of_own = weights[..., length:].to(self.added_dtype) @ added_values
        mixed = of_prefix.transpose(1, 2).flatten(0, 1) + of_own.to(self.dtype)
        mixed = mixed.view(batch, self.heads, count, each, self.head)
        return mixed.permute(0, 2, 1, 3, 4).flatten(2)

    def _whole(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(layers, 1, H, P, head)` of one sequence `(1, P)`."""
        places = torch.arange(tokens.shape[1], device=self.device)
        cos, sin = rotary(places, self.head, self.config.rope_theta)
        cos, sin = cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
        x = F.embedding(tokens, self.embedding)
        eps = self.config.rms_norm_eps
        keys, values = [], []
        for layer in self.layers:
            q, k, v = (part.transpose(1, 2) for part in self._project(layer, x, cos, sin))
            keys.append(k)
            values.append(v)
            each = self.q_heads // self.heads
            wide = (
                (k, v)
                if each == 1
                else (k.repeat_interleave(each, 1), v.repeat_interleave(each, 1))
            )
            mixed = F.scaled_dot_product_attention(q, *wide, is_causal=True)
            x = x + layer.out(mixed.transpose(1, 2).flatten(2))
            x = x + self._mlp(layer, rms_norm(x, layer.between, eps))
        return torch.stack(keys), torch.stack(values)

    def _project(
        self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, m, heads, head)`, the first two turned to their places."""
        normed = rms_norm(x, layer.before, self.config.rms_norm_eps)
        joined = layer.qkv(normed).unflatten(-1, (-1, self.head))
        q, k, v = joined.split([self.q_heads, self.heads, self.heads], dim=2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(F.silu(gate) * up)


class _Work:
    """Buffers of keys and values `(layers, B, H, S, head)` of what rows add to their prefix."""

    def __init__(self, generator: Generator, prefix: Prefix, members: int, length: int) -> None:
        self.shape = (prefix.keys.shape, members)
        self.prefix, self.members, self.length = prefix, members, length
        self.starts, self.prefix_length = prefix.keys.shape[1], prefix.keys.shape[3]
        layers, rows = len(generator.layers), self.starts * members
        size = (layers, rows, generator.heads, length, generator.head)
        self.keys = torch.empty(size, dtype=generator.added_dtype, device=generator.device)
        self.values = torch.empty_like(self.keys)

    def put(self, memory: Tensor) -> None:
        """Fills the beginning from what `take` returned."""
        count = memory.shape[1]
        layers, _, heads, _, head = self.keys.shape
        keys, values = memory.unflatten(-1, (2, layers, heads, head)).permute(2, 3, 0, 4, 1, 5)
        self.keys[:, :, :, :count] = keys
        self.values[:, :, :, :count] = values

    def take(self, count: int) -> Tensor:
        """The first `count` tokens as `(B, count, 2 layers H head)`."""
        both = torch.stack([self.keys[:, :, :, :count], self.values[:, :, :, :count]])
        return both.permute(2, 4, 0, 1, 3, 5).flatten(2)
