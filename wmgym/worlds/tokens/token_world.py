"""The published world model behind the `World` protocol.

A start is a frame, given twice: 1,024 context tokens and 64 dynamics tokens. Every step appends the
action's 7 tokens and imagines the 64 of the next frame; frames are drawn from their tokens and the
context. After `horizon` steps, as long as the sequences of its training, the last imagined frame
becomes the context of the next ones.

What follows from a start alone is kept and used again: the tokens of a frame, the keys and values
of the prefix, the features that frames are drawn on. Rows that are equal are computed once, and so
are frames: equal actions give equal frames, whatever the batch. What does not fit into memory at
once is done in parts, group by group.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmgym.cache import ByteCache
from wmgym.spaces import ACTION_DIM
from wmgym.worlds.horizon_world import HorizonState, HorizonWorld
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.attention import AttentionKind
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.generate import Generator, Prefix
from wmgym.worlds.tokens.noise import keys_of
from wmgym.worlds.tokens.proprio import integrate
from wmgym.worlds.tokens.sampling import GREEDY, Decoding
from wmgym.worlds.tokens.transformer import TokenDynamics, check_sequences
from wmgym.worlds.world import DTYPES, Prediction, select_rows

_log = logging.getLogger(__name__)
_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.6
_SHARE_OF_WORK = 0.75
_LIVE_ACTIVATIONS = 4
_FEATURE_BYTES, _CODE_BYTES = 256 * 2**20, 64 * 2**20
_FRAME_COPIES = 3.5
"""Sizes of all frames of a rollout that an environment with R3 takes at most, as measured."""
_MEMINFO = Path("/proc/meminfo")
_FRAMES_AT_ONCE = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class TokenState(HorizonState):
    """Everything later steps depend on.

    Attributes:
        prefix: `(B, P)` tokens of the start: context and first frame.
        tokens: `(B, horizon, n)` tokens of the frames since, zeros where none was imagined yet.
        actions: `(B, horizon, 7)` tokens of the actions since.
        memory: `(B, S, ...)` keys and values of what was added to the prefix; empty between chunks.
        frame: `(B, 3, H, W)` the latest frame.
        proprio: `(B, 8)` the latest reading.
    """

    prefix: Tensor
    tokens: Tensor
    actions: Tensor
    memory: Tensor
    frame: Tensor
    proprio: Tensor


class TokenWorld(HorizonWorld[TokenState]):
    """A frozen tokenizer and its dynamics; see the module docstring.

    Args:
        tokenizer: The tokenizer, which is copied.
        dynamics: The dynamics over its tokens, which are copied.
        actions: How actions become tokens.
        name: Name shown in reports and errors.
        device: Where to run them.
        dtype: "float32", or "bfloat16" for the dynamics and for drawing; frames become tokens in
            float32 in any case.
        decoding: How tokens are chosen.
        attention: Kernel that passes prefixes: "auto", "sdpa", "flash" (extra; CUDA and bfloat16)
            or "flex".
        horizon: Control steps imagined from one context.
        memory_gib: Memory for keys and values; None: 60 % of what is free now.

    Raises:
        MissingExtraError: "flash" without its package.
        ValueError: Unknown dtype or kernel, "flash" where it cannot run, parts that do not fit
            together, or too little memory for a row.
    """

    proprio_source = "integrated"
    context = 1

    def __init__(
        self,
        tokenizer: CompressiveTokenizer,
        dynamics: TokenDynamics,
        actions: ActionTokens,
        *,
        name: str,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        decoding: Decoding = GREEDY,
        attention: AttentionKind = "auto",
        horizon: int = 8,
        memory_gib: float | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: allowed are {sorted(DTYPES)}")
        side = tokenizer.config.resolution
        super().__init__(name, device, (side, side), horizon)
        self.actions, self.vocabulary = actions, tokenizer.vocabulary(actions.bins)
        check_sequences(dynamics.config, self.vocabulary, horizon + 1)
        networks: Any = _frozen(tokenizer, self.device)
        self.tokenizer: CompressiveTokenizer = networks.to(memory_format=torch.channels_last)
        self._decoder = self.tokenizer
        if dtype != "float32":
            self._decoder = copy.deepcopy(self.tokenizer).to(DTYPES[dtype])
        self.generator = Generator(
            _frozen(dynamics, self.device),
            self.vocabulary,
            decoding,
            DTYPES[dtype],
            attention,
        )
        self.memory_bytes = int(
            _free_memory(self.device) * _SHARE_OF_FREE_MEMORY
            if memory_gib is None
            else memory_gib * _GIB
        )
        if self.generator.nbytes(1, 1, horizon) > self._work_bytes:
            raise ValueError(
                f"memory_gib={self.memory_bytes / _GIB:.2f} is not enough for one row: "
                f"{self.generator.nbytes(1, 1, horizon) / _GIB * 4 / 3:.2f} GiB are needed"
            )
        self._prefixes = ByteCache(self.memory_bytes - self._work_bytes)
        self._features = ByteCache(_FEATURE_BYTES)
        self._codes = ByteCache(_CODE_BYTES)
        _log.info("%s: %s", name, self.plan(16))

    @property
    def _work_bytes(self) -> int:
        """Memory of what is imagined now; the rest keeps prefixes for later."""
        return int(self.memory_bytes * _SHARE_OF_WORK)

    def plan(self, members: int) -> str:
        """How many rows are imagined at once, in words, for groups of `members`."""
        starts, rows = self._fitting(members, self.horizon)
        need = self.generator.nbytes(1, members, self.horizon) / _GIB
        return (
            f"{self.memory_bytes / _GIB:.1f} GiB for keys and values; a start with {members} rows "
            f"takes {need:.2f} GiB, {starts} starts of up to {rows} rows are imagined at once"
        )

    def needed_gib(self, environments: int, members: int) -> float:
        """GiB that so many environments in groups of `members` take to imagine a whole horizon.

        Weights; keys and values of all rows and of a reference row for each group, with the
        prefixes once more where steps are captured; the largest activations of the frames that
        are drawn at once; and all frames with what R3 compares them with, `_FRAME_COPIES` times
        their size. Keys and values beyond `memory_gib` are done in parts, frames are not.
        Environments that take single steps keep fewer frames, but keys and values from step to
        step, about three times over.
        """
        starts = -(-environments // members)
        rows = self.generator.nbytes(starts, members + 1, self.horizon)
        copied = self.generator.nbytes(starts, 0, 0) if self.generator.static else 0
        weights = self.generator.weight_bytes + sum(
            w.nbytes for network in {self.tokenizer, self._decoder} for w in network.parameters()
        )
        widest = self.image_size[0] ** 2 * max(self.tokenizer.config.block_out_channels[:2])
        each = next(self._decoder.parameters()).element_size()
        drawing = _FRAMES_AT_ONCE[self.device.type] * _LIVE_ACTIVATIONS * widest * each
        frames = (environments + starts) * self.horizon * 3 * self.image_size[0] ** 2 * 4
        return (rows + copied + weights + drawing + _FRAME_COPIES * frames) / _GIB

    def forget(self) -> None:
        """Lets go of what is kept of earlier starts."""
        for cache in (self._prefixes, self._features, self._codes):
            cache.clear()

    @torch.no_grad()
    def redraw(self, context: Tensor, frames: Tensor, proprio: Tensor) -> Tensor:
        """Frames as the tokenizer redraws them: the best the dynamics could do.

        Args:
            context: `(B, 3, H, W)` in [0, 1].
            frames: `(B, T, 3, H, W)` to describe and redraw.
            proprio: `(B, 1 + T, 8)`; this tokenizer does not need it.

        Returns:
            `(B, T, 3, H, W)` in [0, 1].
        """
        clips = torch.cat([context[:, None], frames], 1).to(self.device).split(1)
        with _exact_convolutions():
            drawn = [self.tokenizer.decode(*self.tokenizer.encode(clip))[:, 1:] for clip in clips]
        return torch.cat(drawn).clamp(0, 1)

    def _anchor(self, frame: Tensor, proprio: Tensor) -> TokenState:
        batch, n = len(frame), self.vocabulary.dynamics_tokens
        prefix = torch.cat([self._prefix_of(f) for f in frame.split(1)])
        return TokenState(
            prefix=prefix,
            tokens=prefix.new_zeros(batch, self.horizon, n),
            actions=prefix.new_zeros(batch, self.horizon, ACTION_DIM),
            steps=prefix.new_zeros(batch),
            memory=self.generator.no_memory(batch),
            frame=frame,
            proprio=proprio[:, -1],
        )

    def _prefix_of(self, frame: Tensor) -> Tensor:
        """Tokens `(1, P)` of a frame `(1, 3, H, W)`."""
        key = hashlib.blake2b(frame.cpu().numpy().tobytes(), digest_size=16).digest()
        found = self._codes.get(key)
        if found is None:
            with _exact_convolutions():
                context, features = self.tokenizer.encode_context(frame)
                first = self.tokenizer.encode_dynamics(frame, features)
            found = self.vocabulary.start(context, first)
            self._codes.put(key, found, found.nbytes)
        return found

    def _latest(self, state: TokenState) -> tuple[Tensor, Tensor]:
        return state.frame, state.proprio[:, None]

    def _advance(
        self, state: TokenState, actions: Tensor, taken: int, every: int
    ) -> tuple[TokenState, Prediction]:
        until = taken + actions.shape[1]
        action_tokens = state.actions.clone()
        action_tokens[:, taken:until] = self.vocabulary.actions(self.actions.encode(actions))
        history = torch.cat(
            [state.prefix, state.tokens[:, :taken].flatten(1), action_tokens[:, :until].flatten(1)],
            1,
        )
        rows, which = _first_of_equal(history)  # equal rows are imagined once
        part = dataclasses.replace(state, actions=action_tokens)
        alike = len(rows) < len(which)
        if alike:
            part = select_rows(part, rows)
        tokens, memory = self._imagine(part, taken, until)
        drawn = self._draw(part.prefix, tokens[:, taken:until][:, every - 1 :: every])
        proprio = integrate(state.proprio, actions)
        if alike:
            tokens, memory, drawn = tokens[which], memory[which], drawn[which]
        after = TokenState(
            prefix=state.prefix,
            tokens=tokens,
            actions=action_tokens,
            steps=torch.full_like(state.steps, until),
            memory=memory,
            frame=drawn[:, -1],
            proprio=proprio[:, -1],
        )
        return after, Prediction(frames=drawn, proprio=proprio)

    def _imagine(self, state: TokenState, taken: int, until: int) -> tuple[Tensor, Tensor]:
        """Tokens `(B, horizon, n)` up to step `until`, and the memory after."""
        tokens = state.tokens.clone()
        keep = until < self.horizon
        parts: list[tuple[Tensor, Tensor]] = []
        noise = keys_of(state.prefix, self.generator.decoding.seed)
        for rows in self._parts(state.prefix, until):
            flat = rows.flatten()
            imagined, added = self.generator.generate(
                self._passed(state.prefix[rows[:, 0]]),
                rows.shape[1],
                state.actions[flat, taken:until],
                noise[flat],
                past=(tokens[flat, :taken], state.memory[flat]) if taken else None,
                keep=keep,
            )
            tokens[flat, taken:until] = imagined
            parts.append((flat, added))
        if len(parts) == 1 and torch.equal(parts[0][0].cpu(), torch.arange(len(state))):
            return tokens, parts[0][1]
        memory = parts[0][1].new_empty(len(state), *parts[0][1].shape[1:])
        for flat, added in parts:
            memory[flat] = added
        return tokens, memory

    def _parts(self, prefix: Tensor, steps: int) -> Iterator[Tensor]:
        """Rows as matrices `(N, G)` that fit into memory: those of a line share their prefix.

        Lines are filled up to the same length by repeating their first row.
        """
        _, which = _first_of_equal(prefix)
        lines = [(which == start).nonzero()[:, 0] for start in range(int(which.max()) + 1)]
        most = max(len(line) for line in lines)
        starts, members = self._fitting(most, steps)
        pieces = [piece for line in lines for piece in line.split(members)]
        for begin in range(0, len(pieces), starts):
            some = pieces[begin : begin + starts]
            if self.generator.static:  # of another shape, steps would be captured again
                some += some[:1] * (min(starts, len(pieces)) - len(some))
            width = max(len(piece) for piece in (pieces if self.generator.static else some))
            yield torch.stack([torch.cat([p, p[:1].expand(width - len(p))]) for p in some])

    def _fitting(self, members: int, steps: int) -> tuple[int, int]:
        """How many starts with how many rows each fit into memory."""
        one = self.generator.nbytes(1, members, steps)
        if one <= self._work_bytes:
            return self._work_bytes // one, members
        alone = self.generator.nbytes(1, 0, steps)
        row = self.generator.nbytes(1, 1, steps) - alone
        return 1, max(1, (self._work_bytes - alone) // row)

    def _passed(self, prefix: Tensor) -> Prefix:
        """Keys and values of prefixes `(N, P)`; those that come up again are kept."""
        passed = [self._once(self._prefixes, row, self.generator.prefix) for row in prefix.split(1)]
        return passed[0] if len(passed) == 1 else Prefix.join(passed)

    def _context_features(self, prefix: Tensor) -> tuple[Tensor, ...]:
        """What frames of a start `(1, P)` are drawn on."""
        context = prefix[:, : self.vocabulary.context_tokens] - self.vocabulary.dynamics
        return tuple(self._decoder.context_features(context))

    def _once(
        self, cache: ByteCache, row: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> Any:
        """A function of a row of tokens, computed once as long as the cache keeps it."""
        key = row.cpu().numpy().tobytes()
        found = cache.get(key)
        if found is None:
            found = function(row)
            cache.put(key, found, sum(part.nbytes for part in found))
        return found

    def _draw(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Frames `(B, T, 3, H, W)` in [0, 1] of tokens `(B, T, n)`; equal ones are drawn once."""
        batch, count = tokens.shape[:2]
        of_start, start = _first_of_equal(prefix)
        features = [
            self._once(self._features, row, self._context_features)
            for row in prefix[of_start].split(1)
        ]
        named = torch.cat([start.repeat_interleave(count)[:, None], tokens.flatten(0, 1)], 1)
        rows, which = _first_of_equal(named)
        codes = named[rows, 1:].clamp(0, self.vocabulary.dynamics - 1)
        starts = named[rows, 0].tolist()
        size = _FRAMES_AT_ONCE[self.device.type]
        frames = torch.empty(batch * count, 3, *self.image_size, device=self.device)
        for begin in range(0, len(rows), size):
            some = torch.arange(begin, begin + size).clamp(max=len(rows) - 1).tolist()
            levels = zip(*(features[starts[i]] for i in some), strict=True)
            drawn = self._decoder.draw(codes[some], [torch.cat(level) for level in levels])
            frames[rows[some]] = drawn.float().clamp(0, 1)
        source = rows[which]
        again = (source != torch.arange(len(source), device=self.device)).nonzero()[:, 0]
        frames[again] = frames[source[again]]
        return frames.view(batch, count, *frames.shape[1:])


def _first_of_equal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows `(B, L)`: the first of every set of equal ones, in order, and whose equal each is."""
    _, which = rows.unique(dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(places, len(rows)).scatter_reduce(0, which, places, "amin")
    first = first[: int(which.max()) + 1]
    order = first.argsort()
    return first[order], order.argsort()[which]


def _frozen(network: nn.Module, device: torch.device) -> Any:
    """A copy of a network; the caller's is left as it is."""
    return copy.deepcopy(network).to(device).eval().requires_grad_(False)


def _exact_convolutions() -> AbstractContextManager[None]:
    """On CUDA, convolutions of float32 in float32: by default they round to 10 bits."""
    now = torch.backends.cudnn
    return now.flags(
        enabled=now.enabled,
        benchmark=now.benchmark,
        deterministic=now.deterministic,
        allow_tf32=False,
    )


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of a host that does not tell, half of all it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        found = re.search(r"^MemAvailable: +(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
