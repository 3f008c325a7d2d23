"""The published world model behind the `World` protocol.

A start is a frame, told twice: 1,024 context tokens and 64 dynamics tokens. Every step appends the
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wmgym.cache import ByteCache
from wmgym.spaces import ACTION_DIM, PROPRIO_DIM
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.attention import AttentionKind
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.generate import Generator, Prefix
from wmgym.worlds.tokens.noise import keys_of
from wmgym.worlds.tokens.proprio import integrate
from wmgym.worlds.tokens.sampling import GREEDY, Decoding
from wmgym.worlds.tokens.transformer import TokenDynamics
from wmgym.worlds.tokens.vocabulary import Vocabulary
from wmgym.worlds.world import DTYPES, Prediction, WorldState, cat_rows, select_rows

_log = logging.getLogger(__name__)
_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.6
_SHARE_OF_WORK = 0.75
_LIVE_ACTIVATIONS = 4
_CANVAS_BYTES, _CODE_BYTES = 256 * 2**20, 64 * 2**20
_FRAME_COPIES = 3.5
"""Sizes of all frames of a rollout that an environment with R3 takes at most, as measured."""
_FRAMES_AT_ONCE = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class TokenState(WorldState):
    """Everything later steps depend on.

    Attributes:
        prefix: `(B, P)` tokens of the start: context and first frame.
        tokens: `(B, horizon, n)` tokens of the frames since, zeros where none was imagined yet.
        actions: `(B, horizon, 7)` tokens of the actions since.
        steps: `(B,)` int64, how many were taken.
        memory: `(B, S, ...)` keys and values of what was added to the prefix; empty between chunks.
        frame: `(B, 3, H, W)` the latest frame.
        proprio: `(B, 8)` the latest reading.
    """

    prefix: Tensor
    tokens: Tensor
    actions: Tensor
    steps: Tensor
    memory: Tensor
    frame: Tensor
    proprio: Tensor


@dataclass(frozen=True)
class Canvas:
    """What the frames of a start are drawn on: features `(1, C, h, w)` of its context."""

    features: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(f.nbytes for f in self.features)


class TokenWorld:
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
        attention: Kernel that passes prefixes: "auto", "sdpa", "flash" (extra) or "flex".
        horizon: Control steps imagined from one context.
        memory_gib: Memory for keys and values; None: 60 % of what is free now.

    Raises:
        ValueError: Unknown dtype, parts that do not fit together, or too little memory for a row.
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
        self.name, self.device = name, torch.device(device)
        self.actions, self.horizon = actions, horizon
        shape = tokenizer.config
        self.image_size = (shape.resolution, shape.resolution)
        self.vocabulary = Vocabulary(
            dynamics=tokenizer.dynamics_fsq.codes,
            context=tokenizer.fsq.codes,
            bins=actions.bins,
            context_tokens=shape.context_tokens,
            dynamics_tokens=shape.dynamics_tokens,
        )
        self._check_fit(dynamics)
        networks: Any = _frozen(tokenizer, self.device)
        self.tokenizer: CompressiveTokenizer = networks.to(memory_format=torch.channels_last)
        self._painter = self.tokenizer
        if dtype != "float32":
            self._painter = copy.deepcopy(self.tokenizer).to(DTYPES[dtype])
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
        self._canvases = ByteCache(_CANVAS_BYTES)
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
            w.nbytes for network in {self.tokenizer, self._painter} for w in network.parameters()
        )
        widest = self.image_size[0] ** 2 * max(self.tokenizer.config.block_out_channels[:2])
        each = next(self._painter.parameters()).element_size()
        drawing = _FRAMES_AT_ONCE[self.device.type] * _LIVE_ACTIVATIONS * widest * each
        frames = (environments + starts) * self.horizon * 3 * self.image_size[0] ** 2 * 4
        return (rows + copied + weights + drawing + _FRAME_COPIES * frames) / _GIB

    @torch.no_grad()
    def start(self, frames: Tensor, proprio: Tensor) -> TokenState:
        """State at the last of the context frames `(B, C, 3, H, W)` and readings `(B, C, 8)`.

        Raises:
            ValueError: Shapes do not fit.
        """
        expected = (3, *self.image_size)
        if frames.ndim != 5 or tuple(frames.shape[2:]) != expected or frames.shape[1] < 1:
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}, expected (B, C, *{expected}), C >= 1"
            )
        if proprio.shape != (*frames.shape[:2], PROPRIO_DIM):
            raise ValueError(
                f"proprio has shape {tuple(proprio.shape)}, frames {tuple(frames.shape)}: "
                f"expected (B, C, {PROPRIO_DIM}) with their B and C"
            )
        frame = frames[:, -1].to(self.device, torch.float32)
        return self._anchor(frame, proprio[:, -1].to(self.device, torch.float32))

    def forget(self) -> None:
        """Lets go of what is kept of earlier starts."""
        for cache in (self._prefixes, self._canvases, self._codes):
            cache.clear()

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
            proprio=proprio,
        )

    def _prefix_of(self, frame: Tensor) -> Tensor:
        """Tokens `(1, P)` of a frame `(1, 3, H, W)`."""
        key = hashlib.blake2b(frame.cpu().numpy().tobytes(), digest_size=16).digest()
        found = self._codes.get(key)
        if found is None:
            context, features = self.tokenizer.look(frame)
            first = self.tokenizer.encode_dynamics(frame, features)
            found = self.vocabulary.start(context, first)
            self._codes.put(key, found, found.nbytes)
        return found

    @torch.no_grad()
    def step(
        self, state: TokenState, actions: Tensor, every: int = 1
    ) -> tuple[TokenState, Prediction]:
        """Advances every row by `T` control steps, `actions` `(B, T, 7)`; see `World.step`.

        Raises:
            ValueError: Shapes do not fit, or `every` would leave out a frame that is needed later.
        """
        expected = (len(state), *actions.shape[1:2], ACTION_DIM)
        if actions.shape != expected or actions.shape[1] < 1:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, "
                f"expected ({len(state)}, T, {ACTION_DIM}), T >= 1"
            )
        if actions.shape[1] % every or self.horizon % every or bool((state.steps % every).any()):
            raise ValueError(
                f"every={every}: the {actions.shape[1]} steps, those taken before and the horizon "
                f"of {self.horizon} must be multiples of it"
            )
        actions = actions.to(self.device, torch.float32)
        groups = [(state.steps == k).nonzero()[:, 0] for k in state.steps.unique()]
        if len(groups) == 1:
            return self._step_together(state, actions, every)
        parts = [
            self._step_together(select_rows(state, rows), actions[rows], every) for rows in groups
        ]
        back = torch.cat(groups).argsort()
        after = cat_rows([part for part, _ in parts])
        return select_rows(after, back), Prediction(
            frames=torch.cat([p.frames for _, p in parts])[back],
            proprio=torch.cat([p.proprio for _, p in parts])[back],
        )

    def select(self, state: TokenState, index: Tensor) -> TokenState:
        """Rows `index` `(N,)` of a state, repeats allowed."""
        return select_rows(state, index)

    def _step_together(
        self, state: TokenState, actions: Tensor, every: int
    ) -> tuple[TokenState, Prediction]:
        """Steps rows that have taken equally many steps, so that all need a new context at once."""
        predictions: list[Prediction] = []
        taken, done = int(state.steps[0]), 0
        while done < actions.shape[1]:
            if taken == self.horizon:
                state, taken = self._anchor(state.frame, state.proprio), 0
            now = actions[:, done : done + self.horizon - taken]
            state, prediction = self._advance(state, now, taken, every)
            predictions.append(prediction)
            done, taken = done + now.shape[1], taken + now.shape[1]
        if len(predictions) == 1:
            return state, predictions[0]
        return state, Prediction(
            frames=torch.cat([p.frames for p in predictions], 1),
            proprio=torch.cat([p.proprio for p in predictions], 1),
        )

    def _advance(
        self, state: TokenState, actions: Tensor, taken: int, every: int
    ) -> tuple[TokenState, Prediction]:
        """Steps within the horizon; equal rows are imagined once."""
        until = taken + actions.shape[1]
        told = state.actions.clone()
        told[:, taken:until] = self.vocabulary.actions(self.actions.encode(actions))
        history = torch.cat(
            [state.prefix, state.tokens[:, :taken].flatten(1), told[:, :until].flatten(1)], 1
        )
        rows, which = _first_of_equal(history)
        part = dataclasses.replace(state, actions=told)
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
            actions=told,
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
            width = max(len(piece) for piece in some)
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

    def _canvas(self, prefix: Tensor) -> Canvas:
        """What frames of a start `(1, P)` are drawn on."""
        context = prefix[:, : self.vocabulary.context_tokens] - self.vocabulary.dynamics
        return Canvas(tuple(self._painter.canvas(context)))

    def _once(self, cache: ByteCache, row: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """A function of a row of tokens, computed once as long as the cache keeps it."""
        key = row.cpu().numpy().tobytes()
        found = cache.get(key)
        if found is None:
            found = function(row)
            cache.put(key, found, found.nbytes)
        return found

    def _draw(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Frames `(B, T, 3, H, W)` in [0, 1] of tokens `(B, T, n)`; equal ones are drawn once."""
        batch, count = tokens.shape[:2]
        of_start, start = _first_of_equal(prefix)
        canvases = [
            self._once(self._canvases, row, self._canvas) for row in prefix[of_start].split(1)
        ]
        named = torch.cat([start.repeat_interleave(count)[:, None], tokens.flatten(0, 1)], 1)
        rows, which = _first_of_equal(named)
        codes = named[rows, 1:].clamp(0, self.vocabulary.dynamics - 1)
        starts = named[rows, 0].tolist()
        size = _FRAMES_AT_ONCE[self.device.type]
        frames = torch.empty(batch * count, 3, *self.image_size, device=self.device)
        for begin in range(0, len(rows), size):
            some = torch.arange(begin, begin + size).clamp(max=len(rows) - 1).tolist()
            levels = zip(*(canvases[starts[i]].features for i in some), strict=True)
            drawn = self._painter.draw(codes[some], [torch.cat(level) for level in levels])
            frames[rows[some]] = drawn.float().clamp(0, 1)
        source = rows[which]
        again = (source != torch.arange(len(source), device=self.device)).nonzero()[:, 0]
        frames[again] = frames[source[again]]
        return frames.view(batch, count, *frames.shape[1:])

    def _check_fit(self, dynamics: TokenDynamics) -> None:
        longest = self.vocabulary.prefix + self.horizon * self.vocabulary.frame
        config = dynamics.config
        if config.vocab_size < self.vocabulary.size or config.max_position_embeddings < longest:
            raise ValueError(
                f"the dynamics know {config.vocab_size} tokens and "
                f"{config.max_position_embeddings} positions; tokenizer and actions need "
                f"{self.vocabulary.size} and {longest}"
            )


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


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
