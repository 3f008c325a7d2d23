"""In which convention of actions a published world was trained, told by its own losses.

For random windows of a dataset, the loss of the dynamics tokens of frames 1 ... is measured with
the actions as LIBERO takes them ("raw") and scaled by percentiles with the gripper turned
("normalised"), each beside a control, where every window is told the actions of another one. A
convention fits if its own actions help: if its control is worse, by more than chance. Of two that
fit, the one with the lower loss is that of the training. If none fits, the world does not listen to
actions in either, or was not trained on such pictures.

Intervals are percentiles of means over windows drawn again with replacement (Efron 1979). Both
differences are paired by window.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmgym.data import StoredDataset, open_dataset
from wmgym.distributed import processes
from wmgym.worlds.evaluate import random_starts, read_windows
from wmgym.worlds.tokens.action_tokens import ActionTokens, quantiles_of
from wmgym.worlds.tokens.load import load_parts
from wmgym.worlds.tokens.objective import cross_entropy, predictions

_DRAWS = 2000
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class DiagnosisConfig:
    """Tell in which convention of actions a published world was trained.

    Attributes:
        world: Folder of the world, or its id on the hub.
        data: Folder of a LeRobot v3 or RLDS dataset of the kind it was trained on.
        tokenizer: Folder, or id, of the tokenizer; None looks where `load_token_world` does.
        out: The report.
        windows: Random windows.
        frames: Frames of a window, the first one included.
        batch_size: Windows at once.
        seed: Seed of windows, controls and intervals.
        device: "auto", "cpu" or "cuda".
        bfloat16: Matrix products in bfloat16.
    """

    world: str
    data: Path
    tokenizer: str | None = None
    out: Path = Path("diagnosis.json")
    windows: int = 128
    frames: int = 9
    batch_size: int = 4
    seed: int = 0
    device: str = "auto"
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.windows < 2 or self.frames < 2 or self.batch_size < 1:
            raise ValueError(
                f"windows={self.windows}, frames={self.frames}, batch_size={self.batch_size}: must "
                "be >= 2, >= 2 and >= 1"
            )


def diagnose(config: DiagnosisConfig, *, progress: bool = True) -> dict[str, Any]:
    """Scores both conventions.

    Args:
        config: What to score.
        progress: Show a progress bar on stderr.

    Returns:
        `fits`: "raw", "normalised", "neither", or "undecided" where both fit alike; `stored`: what
        the checkpoint says; `losses` by convention, in nats a token: `own` and `shuffled` means,
        and `gain`, shuffled minus own, with its 95 % interval; `raw_minus_normalised` with its
        interval; `windows`; the `ranges` of the bins; `quantiles` of the normalised convention and
        `quantiles_from`, "checkpoint" or "data".

    Raises:
        CheckpointError: The world cannot be used.
        DatasetError: The dataset's files are damaged.
        ValueError: No episode is long enough, or fewer than two windows.
    """
    tokenizer, dynamics, stored = load_parts(config.world, tokenizer=config.tokenizer)
    dataset = open_dataset(config.data)
    horizon, side = config.frames - 1, tokenizer.config.resolution
    rng = np.random.default_rng(config.seed)
    places = random_starts(dataset.episodes, horizon, config.windows, rng)
    if len(places) < 2:
        raise ValueError(
            f"{dataset.root} has {len(places)} windows of {config.frames} frames; at least 2 are "
            "needed: take fewer frames or more data"
        )
    conventions = _conventions(stored, dataset)
    other = _others(len(places), rng)
    vocabulary = tokenizer.vocabulary(stored.bins)

    def losses(bins: Tensor) -> NDArray[np.float64]:
        sequences = vocabulary.sequence(context, later, bins)
        found = [
            cross_entropy(*predictions(dynamics, vocabulary, part))
            for part in tqdm(sequences.split(config.batch_size), disable=not progress)
        ]
        return torch.cat(found).double().cpu().numpy()

    with (
        processes(config.device) as here,
        torch.no_grad(),
        torch.autocast(here.device.type, torch.bfloat16, enabled=config.bfloat16),
    ):
        tokenizer.to(here.device)
        dynamics.to(here.device)
        tokens, actions = [], []
        for place in tqdm(places, desc="tokens", disable=not progress):
            frames, _, taken = read_windows(
                dataset, [place], horizon, context=1, image_size=(side, side)
            )
            tokens.append(tokenizer.encode(torch.cat([frames[:, :1], frames], 1).to(here.device)))
            actions.append(taken)
        context, later = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        context, recorded = context[:, 0], torch.cat(actions).to(here.device)
        own = {name: losses(way.encode(recorded)) for name, way in conventions.items()}
        shuffled = {name: losses(way.encode(recorded[other])) for name, way in conventions.items()}
    figures: dict[str, dict[str, Any]] = {
        name: {
            "own": float(own[name].mean()),
            "shuffled": float(shuffled[name].mean()),
            "gain": _interval(shuffled[name] - own[name], config.seed),
        }
        for name in conventions
    }
    difference = _interval(own["raw"] - own["normalised"], config.seed)
    return {
        "fits": verdict({name: f["gain"] for name, f in figures.items()}, difference),
        "stored": stored.action_space,
        "losses": figures,
        "raw_minus_normalised": difference,
        "windows": len(places),
        "quantiles": [list(pair) for pair in conventions["normalised"].quantiles or ()],
        "quantiles_from": "data" if stored.quantiles is None else "checkpoint",
        "ranges": [list(pair) for pair in stored.ranges],
    }


def verdict(gains: dict[str, dict[str, float]], difference: dict[str, float]) -> str:
    """Which convention fits: "raw", "normalised", "neither" or "undecided".

    Args:
        gains: By convention, the interval of what its own actions gain over those of others.
        difference: Interval of raw's loss minus normalised's.
    """
    fitting = [name for name, gain in gains.items() if gain["low"] > 0]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        return "neither"
    if difference["high"] < 0:
        return "raw"
    return "normalised" if difference["low"] > 0 else "undecided"


def summary(figures: dict[str, Any]) -> str:
    """What `diagnose` found, in words."""
    lines = [f"loss of dynamics tokens in nats, {figures['windows']} windows"]
    for name, found in figures["losses"].items():
        lines.append(
            f"{name:11s} own actions {found['own']:.4f}, others' {found['shuffled']:.4f}, "
            f"gain {_shown(found['gain'])}"
        )
    lines.append(f"raw minus normalised {_shown(figures['raw_minus_normalised'])}")
    said = {
        "neither": "neither convention is better than the actions of other windows",
        "undecided": "both conventions fit alike: take more windows",
    }
    fits = figures["fits"]
    lines.append(said.get(fits, f"it was trained with {fits} actions"))
    if fits not in (*said, figures["stored"]):
        lines.append(
            f"its actions.json says {figures['stored']}: set action_space there to {fits!r}, and "
            "quantiles to those of the report"
        )
    return "\n".join(lines)


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"


def _conventions(stored: ActionTokens, dataset: StoredDataset) -> dict[str, ActionTokens]:
    """Both conventions over the checkpoint's ranges."""
    quantiles = stored.quantiles
    if quantiles is None:
        numbers = [dataset.read_numbers(info.episode_id)[1] for info in dataset.episodes]
        quantiles = quantiles_of(np.concatenate(numbers))
    return {
        "raw": dataclasses.replace(stored, action_space="raw", quantiles=None),
        "normalised": dataclasses.replace(stored, action_space="normalised", quantiles=quantiles),
    }


def _others(count: int, rng: np.random.Generator) -> Tensor:
    """For every window `(count,)` another one, each taken once."""
    order = rng.permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)
    return torch.from_numpy(other)


def _interval(values: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Mean of values `(N,)` and its 95 % bootstrap interval."""
    rng = np.random.default_rng([seed, 1])
    means = values[rng.integers(len(values), size=(_DRAWS, len(values)))].mean(axis=1)
    low, high = np.percentile(means, _LEVEL)
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
