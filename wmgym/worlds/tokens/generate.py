"""Fast generation of frames' tokens, written for the structure of the problem.

All members of a group and their reference begin with the same 1,088 of 1,095 tokens. The prefix is
passed once per start and attended to as one: the queries of all rows that share it are one matrix.
What each row adds goes into buffers that are never copied; the actions of a step go in as one pass;
only the tokens that may come next are scored. On CUDA the step is captured in a graph, one for
every frame of a rollout, since what it attends to grows.

Rows are laid out in `N` starts of `G` members. A row's result does not depend on others': with
sampling, noise is a hash of seed, start and place (`noise.py`), the same for all rows of a start.

Shapes: `B = N G` rows, `P` tokens of a prefix, `S` tokens added, `H` heads, `n` tokens of a frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmgym.worlds.tokens.attention import (
    AttentionKind,
    causal_attention,
    shared_prefix_attention,
)
from wmgym.worlds.tokens.noise import combine
from wmgym.worlds.tokens.products import Product, product
from wmgym.worlds.tokens.sampling import Decoding, choose
from wmgym.worlds.tokens.transformer import TokenDynamics, rms_norm, rotary, rotate
from wmgym.worlds.tokens.vocabulary import Vocabulary

Step: TypeAlias = Callable[[], None]
"""What reads and writes fixed buffers only, so that it can be captured."""
Capture: TypeAlias = Callable[[Step, Sequence[Tensor]], Step]
"""Makes a captured step of a step and of those buffers that trying it out must not change."""


class Prefix(NamedTuple):
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
        attention: Kernel that passes prefixes; what follows them has its own attention.

    Raises:
        MissingExtraError: "flash" without its package.
        ValueError: "flash" where it cannot run, or an unknown kernel.

    Attributes:
        static: Whether steps have fixed shapes, so that they can be captured: on CUDA.
        capturing: Makes what captures the steps of a cache.
    """

    def __init__(
        self,
        dynamics: TokenDynamics,
        vocabulary: Vocabulary,
        decoding: Decoding,
        dtype: torch.dtype = torch.float32,
        attention: AttentionKind = "auto",
    ) -> None:
        config = dynamics.config
        self.config, self.vocabulary, self.decoding, self.dtype = (
            config,
            vocabulary,
            decoding,
            dtype,
        )
        self.device = dynamics.lm_head.weight.device
        if attention == "flash" and (self.device.type != "cuda" or dtype != torch.bfloat16):
            raise ValueError(
                f"attention='flash' on {self.device} in {dtype}: flash-attn needs device='cuda' "
                "and dtype='bfloat16'; attention='auto' does without"
            )
        self.static = self.device.type == "cuda"
        self.capturing: Callable[[], Capture] = functools.partial(cuda_graphs, self.device)
        # On a CPU, the kernels for one query are slower in bfloat16 than in float32.
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
        self._causal = causal_attention(attention)
        self._cache: _KVCache | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, as they are multiplied with."""
        c = self.config
        heads = (2 * self.q_heads + 2 * self.heads) * self.head
        layer = c.hidden_size * (heads + 3 * c.intermediate_size + 2)
        count = c.num_hidden_layers * layer + c.hidden_size * (2 * c.vocab_size + 1)
        return count * self.dtype.itemsize

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
        cache = self._cache_for(prefix, members, (taken + actions.shape[1]) * frame - 1)
        if past is not None:
            cache.restore(past[1][:, :at])
        frames = []
        for number, action in enumerate(actions.unbind(1), taken):
            given = action if last is None else torch.cat([last, action], 1)
            tokens = self._frame(cache, given, at, combine(noise, number))
            at, last = (number + 1) * frame - 1, tokens[:, -1:]
            frames.append(tokens)
        return torch.stack(frames, 1), cache.saved(at if keep else 0)

    def _frame(self, cache: _KVCache, given: Tensor, at: int, noise: Tensor) -> Tensor:
        """The `n` tokens `(B, n)` of a frame after the tokens `given` `(B, m)` at place `at`."""
        count = self.vocabulary.dynamics_tokens
        end = at + given.shape[1] + count - 1
        cache.place.fill_(at)
        first = self._next(self._pass(cache, given, end), combine(noise, 0))
        cache.tokens[:, 0], cache.noise[:] = first, noise
        cache.place.fill_(at + given.shape[1])
        cache.number.fill_(1)
        one_more = self._captured(cache, end)
        for _ in range(1, count):
            one_more()
        return cache.tokens.clone()

    def _captured(self, cache: _KVCache, end: int) -> Step:
        """`_one_more` for a frame that ends at place `end`, as a graph where that is faster."""
        if cache.capture is None:
            return lambda: self._one_more(cache, end)
        if end not in cache.graphs:
            cache.graphs[end] = cache.capture(lambda: self._one_more(cache, end), cache.counters)
        return cache.graphs[end]

    def _one_more(self, cache: _KVCache, end: int) -> None:
        """Adds the last token and chooses the next; all that changes lies in the buffers."""
        last = cache.tokens.gather(1, (cache.number - 1).expand(len(cache.tokens), 1))
        hidden = self._pass(cache, last, end)
        token = self._next(hidden, combine(cache.noise, cache.number))
        cache.tokens.index_copy_(1, cache.number, token[:, None])
        cache.place.add_(1)
        cache.number.add_(1)

    def _next(self, hidden: Tensor, noise: Tensor) -> Tensor:
        return choose(self.unembed(hidden), self.decoding, noise)

    def _cache_for(self, prefix: Prefix, members: int, length: int) -> _KVCache:
        """A cache for rows of a prefix; that of the last call if it fits."""
        cache = self._cache
        if cache is None or not cache.fits(prefix, members, length):
            self._cache = cache = None  # so that they are free before the next are made
            cache = self._cache = _KVCache(self, prefix, members, length)
        cache.begin(prefix)
        return cache

    def _pass(self, cache: _KVCache, tokens: Tensor, end: int) -> Tensor:
        """Adds tokens `(B, m)` from `cache.place` on; returns hidden states `(B, D)` of the last.

        Args:
            cache: What the rows have added so far.
            tokens: What to add.
            end: Place after the last one that may be attended to. The shapes of everything depend
                on it alone in a graph; otherwise only what is there is read.
        """
        count = tokens.shape[1]
        places = cache.place + torch.arange(count, device=self.device)
        if not self.static:
            end = int(cache.place) + count
        cos, sin = rotary(cache.prefix_length + places, self.head, self.config.rope_theta)
        cos, sin = cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
        allowed = torch.arange(end, device=self.device) <= places[:, None]
        x = F.embedding(tokens, self.embedding)
        eps = self.config.rms_norm_eps
        for number, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            keys, values = cache.keys[number], cache.values[number]
            keys.index_copy_(2, places, k.transpose(1, 2).to(keys.dtype))
            values.index_copy_(2, places, v.transpose(1, 2).to(values.dtype))
            mixed = shared_prefix_attention(
                q,
                (cache.prefix.keys[number], cache.prefix.values[number]),
                (keys[:, :, :end], values[:, :, :end]),
                allowed,
            )
            x = x + layer.out(mixed)
            x = x + self._mlp(layer, rms_norm(x, layer.between, eps))
        return rms_norm(x[:, -1], self.norm, eps)

    def _whole(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(layers, 1, H, P, head)` of one sequence `(1, P)`."""
        places = torch.arange(tokens.shape[1], device=self.device)
        cos, sin = rotary(places, self.head, self.config.rope_theta)
        cos, sin = cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
        x = F.embedding(tokens, self.embedding)
        eps = self.config.rms_norm_eps
        keys, values = [], []
        for layer in self.layers:
            q, k, v = self._project(layer, x, cos, sin)
            keys.append(k.transpose(1, 2))
            values.append(v.transpose(1, 2))
            x = x + layer.out(self._causal(q, k, v).flatten(2))
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


class _KVCache:
    """Buffers of what rows add to their prefix: nothing is copied as they grow.

    Keys and values are `(layers, B, H, S, head)`. Where steps are captured in graphs, these read
    and write here alone, so the prefix lies here as well.
    """

    def __init__(self, generator: Generator, prefix: Prefix, members: int, length: int) -> None:
        device = generator.device
        self.static, self.members, self.length = generator.static, members, length
        self.starts, self.prefix_length = prefix.keys.shape[1], prefix.keys.shape[3]
        rows = self.starts * members
        size = (len(generator.layers), rows, generator.heads, length, generator.head)
        self.keys = torch.zeros(size, dtype=generator.added_dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.prefix = prefix
        if self.static:
            self.prefix = Prefix(torch.empty_like(prefix.keys), torch.empty_like(prefix.values))
        whole: Any = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(rows, generator.vocabulary.dynamics_tokens, **whole)
        self.noise = torch.zeros(rows, **whole)
        self.place = torch.zeros((), **whole)
        self.number = torch.zeros(1, **whole)
        self.graphs: dict[int, Step] = {}
        self.capture = generator.capturing() if self.static else None

    @property
    def counters(self) -> list[Tensor]:
        """What a step changes that must be as before for it to be repeated."""
        return [self.place, self.number, self.tokens]

    def fits(self, prefix: Prefix, members: int, length: int) -> bool:
        """Whether the buffers can hold these rows."""
        same = self.prefix.keys.shape == prefix.keys.shape and self.members == members
        return same and self.length >= length

    def begin(self, prefix: Prefix) -> None:
        """Takes another prefix of the same shape."""
        if not self.static:
            self.prefix = prefix
            return
        self.prefix.keys.copy_(prefix.keys)
        self.prefix.values.copy_(prefix.values)

    def restore(self, memory: Tensor) -> None:
        """Fills the beginning from what `saved` returned."""
        count = memory.shape[1]
        layers, _, heads, _, head = self.keys.shape
        keys, values = memory.unflatten(-1, (2, layers, heads, head)).permute(2, 3, 0, 4, 1, 5)
        self.keys[:, :, :, :count] = keys
        self.values[:, :, :, :count] = values

    def saved(self, count: int) -> Tensor:
        """The first `count` tokens as `(B, count, 2 layers H head)`."""
        layers, rows, heads, _, head = self.keys.shape
        memory = self.keys.new_empty(rows, count, 2, layers, heads, head)
        for number, buffer in enumerate((self.keys, self.values)):
            memory[:, :, number] = buffer[:, :, :, :count].permute(1, 3, 0, 2, 4)
        return memory.flatten(2)


def cuda_graphs(device: torch.device) -> Capture:
    """Captures steps as CUDA graphs: one launch instead of hundreds.

    Graphs of one call share the memory of what is made on the way: none of it is needed after a
    step, and no two run at once.
    """
    stream, pool = _capture_stream(device), torch.cuda.graph_pool_handle()

    def capture(step: Step, counters: Sequence[Tensor]) -> Step:
        before = [counter.clone() for counter in counters]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):  # streams and captures are of the current one
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            for counter, value in zip(counters, before, strict=True):
                counter.copy_(value)
            with torch.cuda.graph(graph, stream=stream, pool=pool):
                step()
        return graph.replay

    return capture


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: libraries keep memory for every stream they were used on."""
    return torch.cuda.Stream(device)
