"""How fast the published world imagines, against Hugging Face's `generate` in the same run.

One start, a group and its reference, some frames each, then R3. What is compared differs in how
tokens are generated and frames are drawn; tokens must agree.

    ours         `wmgym.worlds.tokens`: prefix passed once and shared, buffers, context drawn once
    reprefill    as the released code drives it: `generate` on the whole growing prompt for every
                 frame of every row, then the tokenizer's decoding clip by clip
    generate     `generate` with its cache kept from frame to frame, decoding as above

Both peers roll the reference once. The released code rolls it again for every member; those rows
cost what members cost, so its time is `reprefill` times two groups over one and a row, which the
report tells as derived. Decoding is greedy over the whole vocabulary. Weights may be random; ours
draws equal frames once, so the report has the number of `different_frames`.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmgym.distributed import resolve_device
from wmgym.extras import MissingExtraError, require
from wmgym.rewards.perceptual import LPIPS
from wmgym.rewards.verified import RewardWeights, encode_reference, frame_reward
from wmgym.settings import check_numbers
from wmgym.timing import Timer, peak_memory
from wmgym.worlds.tokens.action_tokens import ActionTokens
from wmgym.worlds.tokens.compressive import CompressiveTokenizer, CompressiveTokenizerConfig
from wmgym.worlds.tokens.load import load_parts
from wmgym.worlds.tokens.sampling import Decoding
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.tokens.transformer import TokenDynamics, TokenDynamicsConfig
from wmgym.worlds.tokens.vocabulary import Vocabulary
from wmgym.worlds.world import DTYPES

_ENVIRONMENTS = (16, 64, 256, 1024)
_HORIZON = 8


@dataclass(frozen=True)
class BenchPublishedConfig:
    """What to measure.

    Attributes:
        world: Hub id or folder of a world in the published layout; None: random weights of the
            published shape.
        members: Members of the group.
        frames: Control steps imagined, at most 8.
        dtypes: Arithmetic of everyone, one measurement for each: "float32", "bfloat16".
        device: "auto", "cpu" or "cuda".
        repeats: Repeats of which the median is reported.
        peers: Also measure the peers (extra `vla`).
        seed: Seed of weights, start and actions.
        out: The report; none is written without.
    """

    world: str | None = None
    members: int = 16
    frames: int = 8
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "auto"
    repeats: int = 3
    peers: bool = True
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        check_numbers(self, ">= 1", "members", "frames", "repeats")
        if self.frames > _HORIZON:
            raise ValueError(
                f"frames={self.frames}: at most {_HORIZON} are imagined from one context"
            )
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"dtypes={self.dtypes}: allowed are {tuple(DTYPES)}")


@dataclass(frozen=True)
class _Case:
    """One start, and the actions `(B, T, 7)` of its rows, the recorded ones last."""

    frame: Tensor
    proprio: Tensor
    actions: Tensor


@dataclass
class _Parts:
    """The world, and what every way of using it has in common."""

    tokenizer: CompressiveTokenizer
    dynamics: TokenDynamics
    actions: ActionTokens
    lpips: LPIPS

    @property
    def vocabulary(self) -> Vocabulary:
        """What tokens mean."""
        return self.tokenizer.vocabulary(self.actions.bins)

    def start(self, case: _Case) -> tuple[Tensor, Tensor]:
        """Tokens of the start: its context's `(1, 1, N)`, and the prefix `(1, P)` of every row."""
        context, first = self.tokenizer.encode(case.frame[:, None].repeat(1, 2, 1, 1, 1))
        return context, self.vocabulary.start(context[:, 0], first[:, 0])

    def action_tokens(self, case: _Case) -> Tensor:
        """Tokens `(B, T, 7)` of the actions."""
        return self.vocabulary.actions(self.actions.encode(case.actions))

    def reward(self, frames: Tensor) -> Tensor:
        """R3 of all rows `(B, T, 3, H, W)` but the last, which is the reference."""
        reference = encode_reference(frames[-1:], self.lpips)
        rows = torch.zeros(len(frames) - 1, dtype=torch.int64, device=frames.device)
        return frame_reward(frames[:-1], reference, self.lpips, RewardWeights(), rows)[0].mean(1)


def bench_published(
    config: BenchPublishedConfig, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measures ours and the peers in turns.

    Args:
        config: What to measure.
        say: Called with a line per measurement.

    Returns:
        By device, by dtype: for each of the `ways` seconds to rewards with its parts,
        `tokens_per_s` and `peak_memory_gib`; the ratios `speedup_vs_reprefill` and
        `speedup_vs_generate`, for generation alone as well; `same_tokens`, the share of our
        tokens that the peers' transformer chooses after the same tokens; and `memory_gib` that
        numbers of environments need.

    Raises:
        MissingExtraError: The peers' transformers is not installed, or cannot be used.
        ValueError: There is no such device.
    """
    if config.peers:
        _hugging_face()
    device = resolve_device(config.device)
    return {device.type: {dtype: _measure(config, dtype, device, say) for dtype in config.dtypes}}


def _measure(
    config: BenchPublishedConfig, dtype: str, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of one precision."""
    parts = _parts(config, dtype, device)
    case = _case(config, parts, device)
    world = TokenWorld(
        parts.tokenizer,
        parts.dynamics,
        parts.actions,
        name="published",
        device=device,
        dtype=dtype,
        decoding=Decoding(restricted=False),
    )
    ways: dict[str, Callable[[], tuple[Tensor, dict[str, float]]]] = {
        "ours": lambda: _ours(world, parts, case)
    }
    if config.peers:
        model = _peer(parts.dynamics, DTYPES[dtype], device)
        painter = copy.deepcopy(parts.tokenizer).to(DTYPES[dtype])
        ways["generate"] = lambda: _with_generate(config, parts, painter, model, case, keep=True)
        ways["reprefill"] = lambda: _with_generate(config, parts, painter, model, case, keep=False)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    tokens: dict[str, Tensor] = {}
    for number in range(config.repeats):
        for name, way in ways.items():
            gc.collect()
            with peak_memory(device) as peak:
                tokens[name], seconds = way()
            seconds["peak_memory_gib"] = peak()
            runs[name].append(seconds)
            say(f"{dtype} {name} {number + 1}/{config.repeats}: {seconds['total']:.2f} s")
    rows = config.members + 1
    generated = rows * config.frames * tokens["ours"].shape[2]
    figures: dict[str, Any] = {
        "members": config.members,
        "frames": config.frames,
        "parameters": sum(p.numel() for p in parts.dynamics.parameters()),
        "different_frames": len(tokens["ours"].flatten(0, 1).unique(dim=0)),
        "repeats": config.repeats,
        "ways": {name: _summary(of, generated) for name, of in runs.items()},
    }
    for name in ways:
        if name != "ours":
            figures |= _ratios(figures["ways"], name)
    figures["memory_gib"] = {
        str(count): round(world.needed_gib(count, config.members), 2) for count in _ENVIRONMENTS
    }
    if config.peers:
        figures["same_tokens"] = round(_agreement(parts, model, case, tokens["ours"]), 4)
        rowed = figures["ways"]["reprefill"]["total"] * 2 * config.members / rows
        figures["derived_released_total"] = round(rowed, 2)
        figures["derived_speedup_vs_released"] = round(rowed / figures["ways"]["ours"]["total"], 2)
    return figures


def random_networks(seed: int) -> tuple[CompressiveTokenizer, TokenDynamics]:
    """The published networks with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = CompressiveTokenizer(CompressiveTokenizerConfig())
        dynamics = TokenDynamics(TokenDynamicsConfig())
        # Rows must differ by their actions, as they do with trained weights, for frames that are
        # equal are drawn once: so weights are large, and attention sharper still.
        for name, weight in dynamics.named_parameters():
            if weight.ndim == 2:
                gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)
    return tokenizer, dynamics


def _parts(config: BenchPublishedConfig, dtype: str, device: torch.device) -> _Parts:
    if config.world is None:
        tokenizer, dynamics = random_networks(config.seed)
        actions = ActionTokens()
    else:
        tokenizer, dynamics, actions = load_parts(config.world)
    for network in (tokenizer, dynamics):
        network.to(device).eval().requires_grad_(False)
    return _Parts(tokenizer, dynamics, actions, LPIPS("alex", dtype=DTYPES[dtype]).to(device))


def _case(config: BenchPublishedConfig, parts: _Parts, device: torch.device) -> _Case:
    generator = torch.Generator().manual_seed(config.seed)
    side = parts.tokenizer.config.resolution
    coarse = torch.rand(1, 3, 16, 16, generator=generator)
    frame = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    actions = torch.rand(config.members + 1, config.frames, 7, generator=generator) * 2 - 1
    return _Case(frame.to(device), torch.zeros(1, 8, device=device), actions.to(device))


def _ours(world: TokenWorld, parts: _Parts, case: _Case) -> tuple[Tensor, dict[str, float]]:
    """A rollout from a start that nothing is known of yet."""
    world.forget()
    count = len(case.actions)
    rows = torch.zeros(count, dtype=torch.int64, device=world.device)
    timer = Timer(world.device)
    with timer("total"), timer.method(world, "_draw", "drawing"):
        with timer("encoding"):
            state = world.start(case.frame[:, None], case.proprio[:, None])
        with timer("generation"):
            state, seen = world.step(world.select(state, rows), case.actions)
        with timer("rewards"):
            parts.reward(seen.frames)
    timer.seconds["generation"] -= timer.seconds["drawing"]
    return state.tokens[:, : case.actions.shape[1]], timer.seconds


def _hugging_face() -> Any:
    """Transformers, whose modules load when they are asked for: with the ones that are needed."""
    transformers = require("transformers", "vla")
    try:
        for name in ("LlamaForCausalLM", "LlamaConfig", "DynamicCache"):
            getattr(transformers, name)
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"transformers cannot load its Llama ({error}): its torchvision must be of the same "
            "build as torch; or leave the peers out with --no-peers"
        ) from error
    return transformers


def _peer(dynamics: TokenDynamics, dtype: torch.dtype, device: torch.device) -> Any:
    """The same transformer in Hugging Face's implementation."""
    transformers = _hugging_face()
    described = {k: v for k, v in dynamics.config.describe().items() if v is not None}
    settings = transformers.LlamaConfig(**described, pad_token_id=described["eos_token_id"])
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(settings).to(device, dtype).eval()
    model.load_state_dict(dynamics.state_dict())
    return model


@torch.no_grad()
def _with_generate(
    config: BenchPublishedConfig,
    parts: _Parts,
    painter: CompressiveTokenizer,
    model: Any,
    case: _Case,
    *,
    keep: bool,
) -> tuple[Tensor, dict[str, float]]:
    """A rollout by `generate`, from scratch for every frame or with the cache kept."""
    transformers = _hugging_face()
    device, rows = case.frame.device, len(case.actions)
    count = painter.config.dynamics_tokens
    timer = Timer(device)
    with timer("total"):
        with timer("encoding"):
            context, start = parts.start(case)
        actions, prompt = parts.action_tokens(case), start.expand(rows, -1)
        cache = transformers.DynamicCache() if keep else None
        imagined = []
        with timer("generation"):
            for t in range(config.frames):
                prompt = torch.cat([prompt, actions[:, t]], 1)
                prompt = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    **({} if cache is None else {"past_key_values": cache}),
                )
                imagined.append(prompt[:, -count:])
        tokens = torch.stack(imagined, 1)
        with timer("drawing"):
            codes = tokens.clamp(max=painter.dynamics_fsq.codes - 1)
            drawn = torch.cat([painter.decode(context, row[None])[:, 1:] for row in codes])
        with timer("rewards"):
            parts.reward(drawn.float().clamp(0, 1))
    return tokens, timer.seconds


@torch.no_grad()
def _agreement(parts: _Parts, model: Any, case: _Case, tokens: Tensor) -> float:
    """Share of tokens `(B, T, n)` that a transformer chooses after those before them.

    Rollouts themselves part for good where two logits are equal but for rounding.
    """
    _, start = parts.start(case)
    frames = torch.cat([parts.action_tokens(case), tokens], 2)
    actions = frames.shape[2] - tokens.shape[2]
    shares = []
    for row, imagined in zip(frames, tokens, strict=True):
        logits = model(torch.cat([start[0], row.flatten()])[None, :-1]).logits[0]
        chosen = logits[start.shape[1] - 1 :].argmax(-1).unflatten(0, row.shape)
        shares.append((chosen[:, actions:] == imagined).float().mean())
    return float(torch.stack(shares).mean())


def _summary(runs: list[dict[str, float]], generated: int) -> dict[str, float]:
    """Medians, and tokens per second of generation."""
    phases = ("total", "encoding", "generation", "drawing", "rewards", "peak_memory_gib")
    medians = {name: statistics.median(run[name] for run in runs) for name in phases}
    medians["tokens_per_s"] = generated / medians["generation"]
    return {name: round(value, 3) for name, value in medians.items()}


def _ratios(ways: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    ours, other = ways["ours"], ways[name]
    return {
        f"speedup_vs_{name}": round(other["total"] / ours["total"], 2),
        f"generation_speedup_vs_{name}": round(other["generation"] / ours["generation"], 2),
    }
