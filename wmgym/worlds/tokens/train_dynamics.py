"""Trains the published dynamics: cross-entropy of next tokens, on those that are to be predicted.

The recipe is that of RLVR-World (arXiv 2505.13934), whose world model VLA-RFT took over: AdamW at
5e-5, constant after 5,000 steps of warm-up, 32 sequences a step in 8 processes, bfloat16, tokens of
augmented frames by the frozen tokenizer. Context, first frame and actions are given, not learned
(`Vocabulary.predicted`).

Departures: a sequence has 9 frames instead of 8, as many as VLA-RFT's fine-tuning later asks for;
its context is f0 itself, as there (`context_lead=15` for a random earlier frame); ranges of actions
are those of the training data, which is how the released ones were made, but can be the released
ones; the number of steps, which was up to a million, is yours; augmentation as in `augment.py`.
`PRESETS["small"]` is a narrower network for two CPU cores, whose tokens are kept on disk.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.distributed import Processes, processes
from wmgym.run import CHECKPOINT, Run, adamw, settings_of
from wmgym.settings import described
from wmgym.training import computing, fingerprints, train_steps, warmup_constant
from wmgym.worlds.tokens.action_tokens import (
    PUBLISHED_RANGES,
    ActionSpace,
    ActionTokens,
    quantiles_of,
)
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.load import load_parts
from wmgym.worlds.tokens.objective import accuracy, cross_entropy, predictions
from wmgym.worlds.tokens.recipe import (
    Means,
    Recipe,
    micro_batches,
    open_clips,
    write_notes,
)
from wmgym.worlds.tokens.sharding import ShardedRun, empty_like, gathered, reshard, shard
from wmgym.worlds.tokens.transformer import TokenDynamics, TokenDynamicsConfig, check_sequences
from wmgym.worlds.tokens.window_tokens import WindowTokens, digest

Ranges = Literal["data", "published"]
Sharding = Literal["none", "fsdp"]

_LEAST_RANGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class DynamicsTraining(Recipe):
    """How dynamics are trained; the defaults are the published recipe.

    Attributes:
        tokenizer: Folder, or id on the hub, of the frozen tokenizer.
        dynamics: Shape of the network.
        action_space: Convention of the actions, as in `ActionTokens`; None: that of `init_from`,
            else "raw".
        ranges: Whether bins span the training data's actions or the released ranges; None: as in
            `init_from` if its convention stays, else "data".
        sharding: "fsdp" spreads weights and optimizer over the processes; it needs `ema` 0.
    """

    tokenizer: str
    steps: int = 100_000
    batch_size: int = 32
    micro_batch: int = 4
    learning_rate: float = 5e-5
    frames: int = 9
    context_lead: int = 0
    dynamics: TokenDynamicsConfig = field(default_factory=TokenDynamicsConfig)
    action_space: ActionSpace | None = None
    ranges: Ranges | None = None
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("action_space", (None, *get_args(ActionSpace))),
            ("ranges", (None, *get_args(Ranges))),
            ("sharding", get_args(Sharding)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {allowed}")
        if self.sharding == "fsdp" and self.ema:
            raise ValueError(f"ema={self.ema}: with sharding='fsdp' it must be 0")


PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {
        "dynamics": TokenDynamicsConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4
        ),
        "steps": 10_000,
        "batch_size": 8,
        "micro_batch": 4,
        "learning_rate": 5e-4,
        "warmup": 200,
        "augment": False,
        "ema": 0.999,
        "validate_every": 500,
        "save_every": 100,
        "bfloat16": False,
    },
}
"""Changes to the defaults by name."""


def fit_actions(
    actions: NDArray[np.float32], action_space: ActionSpace, ranges: Ranges
) -> ActionTokens:
    """How recorded actions become tokens.

    Args:
        actions: Raw actions `(N, 7)` of the training data.
        action_space: The convention.
        ranges: Whose least and largest values bins span, in that convention.
    """
    quantiles = quantiles_of(actions) if action_space == "normalised" else None
    released = ActionTokens(PUBLISHED_RANGES, action_space, quantiles)
    if ranges == "published":
        return released
    values = released.convert(torch.from_numpy(actions)).numpy().astype(np.float64)
    low, high = values.min(axis=0), values.max(axis=0)
    high = np.maximum(high, low + _LEAST_RANGE)
    spans = tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))
    return dataclasses.replace(released, ranges=spans)


class DynamicsTrainer:
    """A run with all that its steps need.

    Args:
        config: How to train.
        model: The dynamics before their first step.
        tokens: Sequences of training and of validation windows.
        here: The processes of the run.

    Attributes:
        run: The run.

    Raises:
        ValueError: Sequences do not fit the dynamics.
    """

    def __init__(
        self,
        config: DynamicsTraining,
        model: TokenDynamics,
        tokens: tuple[WindowTokens, WindowTokens],
        here: Processes,
    ) -> None:
        self.config, self.here = config, here
        self.tokens, self.held = tokens
        self.vocabulary = tokens[0].vocabulary
        check_sequences(model.config, self.vocabulary, config.frames)
        model.to(here.device).train()
        average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
        self.sharded = config.sharding == "fsdp"
        if self.sharded:
            shard(model, model.model.layers, here)
        optimizer = adamw(model, config.learning_rate, config.weight_decay, config.betas)
        kind: type[Run[TokenDynamics]] = ShardedRun if self.sharded else Run
        settings = settings_of(config) | {
            "data_fingerprints": fingerprints(config.data),
            "tokenizer_digest": digest(self.tokens.tokenizer),
            "actions": described(dataclasses.asdict(self.tokens.actions)),
        }
        del settings["steps"]  # nothing depends on it: a finished run may be lengthened
        self.run = kind(model, average, optimizer, settings)

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        config, run = self.config, self.run
        means = Means()
        mine = micro_batches(config, self.tokens.clips, run.step, self.here)

        def losses() -> Iterator[Tensor]:
            for part in mine:
                told = self.tokens.sequences(part.rows, part.seeds)
                with computing(self.here.device, part.seeds[0], bfloat16=config.bfloat16):
                    logits, targets = predictions(run.model, self.vocabulary, told)
                loss = cross_entropy(logits, targets).mean()
                means.add({"loss": loss, "accuracy": accuracy(logits, targets).mean()})
                yield loss / len(mine)

        rate = warmup_constant(run.step, config.learning_rate, config.warmup)
        here = None if self.sharded else self.here
        norm = run.descend(losses(), rate, clip=config.clip, ema=config.ema, here=here)
        return means.over(self.here) | {"gradient_norm": float(norm), "learning_rate": rate}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy on held-out windows, beside copying the token of the frame before."""
        model, frame = self.run.average_or_model.eval(), self.vocabulary.frame
        means = Means()
        for row in self.held.clips.spread(self.config.validation_windows):
            told = self.held.sequences([row])
            with computing(self.here.device, 0, bfloat16=self.config.bfloat16):
                logits, targets = predictions(model, self.vocabulary, told)
            places = self.vocabulary.predicted(told.shape[1]).to(told.device).nonzero()[:, 0]
            means.add(
                {
                    "loss": cross_entropy(logits, targets).mean(),
                    "accuracy": accuracy(logits, targets).mean(),
                    "copy_accuracy": (told[:, places - frame] == targets).float().mean(),
                }
            )
        if self.sharded:
            reshard(model)
        self.run.model.train()
        return means.alone()

    def keep(self) -> None:
        """Writes the world: dynamics, how actions become tokens, and the tokenizer."""
        folder, kept = self.config.out / "world", self.run.average_or_model
        if self.sharded:
            kept = gathered(kept, empty_like(kept))
        if not self.here.main:
            return
        self.tokens.tokenizer.save_pretrained(folder / "tokenizer")
        self.tokens.actions.save(folder)
        kept.save_pretrained(folder)
        write_notes(folder, self.run)


def _start(
    config: DynamicsTraining,
) -> tuple[CompressiveTokenizer, TokenDynamics, ActionTokens | None]:
    """The tokenizer, the dynamics before their first step, and their actions if they have some."""
    if config.init_from is not None:
        tokenizer, model, actions = load_parts(config.init_from, tokenizer=config.tokenizer)
        return tokenizer, model.requires_grad_(True), actions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TokenDynamics(config.dynamics)
    return CompressiveTokenizer.from_pretrained(config.tokenizer), model, None


def _actions(
    config: DynamicsTraining, given: ActionTokens | None, recorded: NDArray[np.float32]
) -> ActionTokens:
    """How actions become tokens: as in `given`, of `init_from`, where `config` does not say."""
    if given is None:
        return fit_actions(recorded, config.action_space or "raw", config.ranges or "data")
    space = config.action_space or given.action_space
    if config.ranges is None and space == given.action_space:
        return given
    fitted = fit_actions(recorded, space, config.ranges or "data")
    return dataclasses.replace(fitted, bins=given.bins)


def train_dynamics(config: DynamicsTraining, *, progress: bool = True) -> Path:
    """Trains dynamics over a frozen tokenizer, or goes on with a run that was interrupted.

    Args:
        config: How to train.
        progress: Show a progress bar on stderr.

    Returns:
        Folder of the finished world, `config.out / "world"`, for `wmgym.worlds.load_token_world`.

    Raises:
        CheckpointError: The checkpoint in `config.out`, the tokenizer, or `init_from`, cannot be
            used.
        DatasetError: A dataset's files are damaged.
        ValueError: The data have no episode to train on, or none to validate on, or sequences do
            not fit the dynamics.
        FloatingPointError: Loss or gradient is not finite.
    """
    tokenizer, model, actions = _start(config)
    config = dataclasses.replace(config, dynamics=model.config)
    config.out.mkdir(parents=True, exist_ok=True)
    with processes(config.device) as here:
        tokenizer.to(here.device)
        clips = open_clips(config, tokenizer.config.resolution, here, progress=progress)
        actions = _actions(config, actions, clips[0].cache.actions)
        config = dataclasses.replace(config, action_space=actions.action_space)
        cache = config.out / "cache"
        kept = (None if clips[0].varied else cache / "train", cache / "validation")
        training, held = (
            WindowTokens(part, tokenizer, actions, folder, bfloat16=config.bfloat16)
            for part, folder in zip(clips, kept, strict=True)
        )
        trainer = DynamicsTrainer(config, model, (training, held), here)
        trainer.run.resume(config.out / CHECKPOINT)
        train_steps(
            trainer.run,
            config,
            here,
            step=trainer.step,
            validate=trainer.validate,
            keep=trainer.keep,
            progress=progress,
            log_every=config.log_every,
        )
    return config.out / "world"
