"""What trainings on demonstrations share: settings, data apart, schedules, and their loop.

What optimizer step `s` sees depends on the seed and `s` alone, so a run that was killed goes on to
the same numbers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmgym.data import FrameCache, open_dataset
from wmgym.data.episodes import HELD_OUT_INIT_STATES, EpisodeInfo
from wmgym.distributed import Processes
from wmgym.log import Log
from wmgym.run import CHECKPOINT, Run
from wmgym.settings import check_numbers


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is set in every training on demonstrations.

    Attributes:
        data: Folders of LeRobot v3 or RLDS datasets.
        out: Folder of the run: checkpoints, log, and the result.
        init_from: Weights to go on from, instead of random ones.
        steps: Optimizer steps.
        batch_size: Examples per step, over all processes.
        learning_rate: Peak of the schedule: linear warm-up, cosine decay to 2 %.
        warmup: Steps of linear warm-up.
        weight_decay: Of AdamW, on matrices only.
        clip: Largest norm of the gradient.
        ema: Decay of the moving average of the weights.
        validation_states: Initial states kept apart to watch progress.
        validation_windows: Windows in a validation.
        validate_every: Steps between validations.
        save_every: Steps between checkpoints.
        seed: Seed of everything random.
        device: "auto", "cpu" or "cuda".
        bfloat16: Matrix products in bfloat16.
    """

    data: tuple[Path, ...]
    out: Path
    init_from: str | None = None
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 500
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    validation_states: tuple[int, ...] = (25,)
    validation_windows: int = 64
    validate_every: int = 1000
    save_every: int = 250
    seed: int = 0
    device: str = "auto"
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty: name at least one dataset folder")
        check_numbers(self, ">= 1", "steps", "batch_size", "save_every")
        check_numbers(self, ">= 1", "validate_every", "validation_windows")
        check_numbers(self, ">= 0", "warmup", "weight_decay", "ema")
        check_numbers(self, "> 0", "learning_rate", "clip")
        if self.ema >= 1:
            raise ValueError(f"ema={self.ema}: must be < 1, or the average never moves")
        check_validation_states(self.validation_states)


@contextlib.contextmanager
def computing(device: torch.device, seed: int, *, bfloat16: bool) -> Iterator[None]:
    """Autocast to bfloat16, if asked for, and dropout, which knows no other source, of a seed."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autocast(device.type, torch.bfloat16, enabled=bfloat16),
    ):
        torch.manual_seed(seed)
        yield


def seed_of(*numbers: int) -> int:
    """A seed for a generator, as unlike those of other numbers as can be."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def fingerprints(data: Sequence[Path]) -> list[str]:
    """What changes when the datasets in folders do: a run goes on only with the same data."""
    return [open_dataset(path).fingerprint()[:16] for path in data]


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then cosine decay to 2 % of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def warmup_constant(step: int, peak: float, warmup: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then `peak`."""
    return peak * min(1.0, (step + 1) / max(1, warmup))


def check_validation_states(states: Sequence[int]) -> None:
    """Keeps the held-out initial states out of training and of its validation.

    Raises:
        ValueError: Some of `states` are held out.
    """
    kept = sorted(set(states) & set(HELD_OUT_INIT_STATES))
    if kept:
        raise ValueError(f"validation_states has {kept}: 40-49 are held out, for reports only")


def split_caches(
    data: Sequence[Path],
    folder: Path,
    *,
    image_size: int | None,
    validation_states: Sequence[int],
    here: Processes,
    progress: bool,
    accepts: Callable[[EpisodeInfo], bool] = lambda info: True,
) -> tuple[FrameCache, FrameCache]:
    """Decoded training and validation episodes; the main process decodes, the others open.

    Args:
        data: Folders of LeRobot v3 or RLDS datasets.
        folder: Where the decoded frames go.
        image_size: Height and width, pixels; None keeps those of the data.
        validation_states: Initial states of the validation episodes.
        here: The processes of the run.
        progress: Show a progress bar.
        accepts: Which episodes may be used at all; held-out ones never are.

    Raises:
        ValueError: There is no episode to train on, or none to validate on.
    """
    datasets = [open_dataset(path) for path in data]

    def validates(info: EpisodeInfo) -> bool:
        return info.validates(validation_states) and accepts(info)

    def trains(info: EpisodeInfo) -> bool:
        return not info.held_out and not info.validates(validation_states) and accepts(info)

    parts = {"train": trains, "validation": validates}
    episodes = [info for dataset in datasets for info in dataset.episodes if accepts(info)]
    for name, chosen in parts.items():
        if not any(map(chosen, episodes)):
            states = sorted({info.init_state_id for info in episodes if not info.held_out})
            raise ValueError(
                f"{[str(path) for path in data]} have no episode for {name} with "
                f"validation_states={tuple(validation_states)}: initial states that may be chosen "
                f"are {states}, some to train on and some to validate on; 40-49 are held out "
                "(where initial states are unknown, -1, every tenth episode validates)"
            )
    if here.main:
        for name, chosen in parts.items():
            FrameCache.build(
                datasets,
                folder / name,
                image_size=None if image_size is None else (image_size, image_size),
                episode_filter=chosen,
                progress=progress,
            )
    here.wait()
    opened = [FrameCache.open(folder / name) for name in parts]
    return opened[0], opened[1]


def train_steps(
    run: Run[Any],
    config: TrainingConfig,
    here: Processes,
    *,
    step: Callable[[], dict[str, float]],
    validate: Callable[[], dict[str, float]],
    keep: Callable[[], None],
    progress: bool,
    shown: str = "loss",
    log_every: int = 50,
    log_last: bool = False,
) -> None:
    """Runs a training to its end, with log, validations and checkpoints.

    Args:
        run: What is trained, resumed already.
        config: How.
        here: The processes of the run.
        step: Makes one optimizer step and returns its figures.
        validate: Scores the weights that are kept; in the main process only, unless the run is
            spread over all of them.
        keep: Writes them; likewise.
        progress: Show a progress bar on stderr.
        shown: The figure of a step that stands beside the progress bar.
        log_every: Steps between logged figures; those of the first one are logged as well.
        log_last: Log those of the last one, too.
    """
    acts = here.main or run.spread
    with Log(config.out, run.step, config.steps, here, progress=progress) as log:
        began = time.monotonic()
        while run.step < config.steps:
            figures = step()
            log.advance(**{shown: figures[shown]})
            now, last = run.step, run.step == config.steps
            if now % log_every == 0 or now == 1 or (log_last and last):
                log.write(now, "train", figures | {"seconds": time.monotonic() - began})
            if acts and (now % config.validate_every == 0 or last):
                scores = validate()
                log.write(now, "validation", scores)
                log.say(f"step {now}: {scores}")
            if acts and (now % config.save_every == 0 or last):
                keep()
                run.save(config.out / CHECKPOINT)
        here.wait()
