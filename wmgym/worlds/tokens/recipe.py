"""What training the tokenizer and training the dynamics have in common.

An optimizer step is made of `batch_size / micro_batch` micro-batches, which the processes share
out. What a micro-batch shows, and what dropout leaves out of it, depends on the seed, the step and
its number, not on who computes it: a run that was killed goes on to the same numbers, and the
number of processes changes them only by rounding. Gradients are summed over a process's share and
then averaged over the processes, once a step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import wmgym
from wmgym.data import FrameCache
from wmgym.distributed import Processes
from wmgym.files import write_text
from wmgym.run import Run
from wmgym.settings import check_numbers
from wmgym.training import TrainingConfig, seed_of, split_caches
from wmgym.worlds.tokens.clips import Clips


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingConfig):
    """How a part of the published world is trained.

    Attributes:
        init_from: Folder, or id on the hub, of weights to go on from; their shape replaces the one
            given.
        batch_size: Clips per step, over all processes.
        micro_batch: Clips that are computed at once.
        learning_rate: Peak of the schedule, after a linear warm-up.
        betas: Of AdamW.
        ema: Decay of a moving average of the weights, which is then what is kept; 0 for none.
        frames: Frames f0 ... fT of a clip beside its context frame.
        context_lead: Most steps that the context frame comes before f0; 0 makes it f0.
        augment: Whether clips are cropped and coloured at random.
        log_every: Steps between logged figures.
        seed: Seed of weights, windows, augmentation and dropout.
    """

    micro_batch: int
    warmup: int = 5000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.0
    frames: int
    context_lead: int
    augment: bool = True
    validate_every: int = 5000
    save_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, ">= 1", "micro_batch", "log_every")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch={self.micro_batch}"
            )
        if self.frames < 2 or self.context_lead < 0:
            raise ValueError(
                f"frames={self.frames}, context_lead={self.context_lead}: must be >= 2 and >= 0"
            )


def open_clips(
    recipe: Recipe, resolution: int, here: Processes, *, progress: bool
) -> tuple[Clips, Clips]:
    """Training and validation clips, resized to `resolution` pixels.

    Raises:
        ValueError: There is no episode to train on, or none to validate on, or none long enough.
        DatasetError: A dataset's files are damaged.
    """
    caches = split_caches(
        recipe.data,
        recipe.out / "cache",
        image_size=resolution,
        validation_states=recipe.validation_states,
        here=here,
        progress=progress,
    )

    def clips(cache: FrameCache) -> Clips:
        return Clips(
            cache,
            recipe.frames,
            recipe.seed,
            here.device,
            lead=recipe.context_lead,
            augment=recipe.augment,
        )

    return clips(caches[0]), clips(caches[1])


@dataclass(frozen=True)
class MicroBatch:
    """Clips that are computed at once.

    Attributes:
        rows: Their windows `(B,)`.
        seeds: One for each, of its view; the first one also of dropout.
    """

    rows: NDArray[np.int64]
    seeds: Sequence[int]


def micro_batches(recipe: Recipe, clips: Clips, step: int, here: Processes) -> list[MicroBatch]:
    """This process's share of a step.

    Raises:
        ValueError: The micro-batches cannot be shared out evenly.
    """
    size, count = recipe.micro_batch, recipe.batch_size // recipe.micro_batch
    if count % here.size:
        raise ValueError(
            f"{count} micro-batches (batch_size={recipe.batch_size} by micro_batch={size}) cannot "
            f"be shared evenly by {here.size} processes"
        )
    rows = clips.sampler.indices(step, recipe.batch_size)
    places = [range(k * size, (k + 1) * size) for k in range(count)[here.rank :: here.size]]
    return [
        MicroBatch(rows[p.start : p.stop], [seed_of(recipe.seed, step, i) for i in p])
        for p in places
    ]


class Means:
    """Figures of the micro-batches of a step, and their means over all processes."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Takes scalars in."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def over(self, here: Processes) -> dict[str, float]:
        """The means; every process must have taken in the same names."""
        return {n: float(here.mean(torch.stack(v).mean())) for n, v in self._values.items()}

    def alone(self) -> dict[str, float]:
        """The means over this process's figures, rounded."""
        return {n: round(float(torch.stack(v).mean()), 5) for n, v in self._values.items()}


def write_notes(folder: Path, run: Run[Any]) -> None:
    """Writes what made the weights in a folder beside them, as `training.json`."""
    notes = {"wmgym": wmgym.__version__, **run.notes}
    write_text(folder / "training.json", json.dumps(notes, indent=2) + "\n")
