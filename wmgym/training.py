"""What every training run needs: data apart, schedule, checkpoints, moving average, log.

Worlds and policies are trained by loops of their own that share these pieces. What optimizer step
`s` sees depends on the seed and `s` alone, so a run that was killed goes on to the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmgym.checkpoints import CheckpointError, reason_of
from wmgym.data import FrameCache, open_dataset
from wmgym.data.episodes import HELD_OUT_INIT_STATES, EpisodeInfo
from wmgym.distributed import Processes
from wmgym.extras import keep_tensorflow_out
from wmgym.files import complete, json_lines, write_text
from wmgym.settings import check_numbers, described

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
CHECKPOINT = "checkpoint.pt"
_AT_ONCE = 2**20


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


class Stateful(Protocol):
    """What can be put into a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, of tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Goes back to a state."""
        ...


@dataclass
class Run(Generic[ModelT]):
    """Everything that is checkpointed; a checkpoint appears complete or not at all.

    Attributes:
        model: What is trained.
        average: Exponential moving average of its weights, if it has one.
        optimizer: The optimizer.
        settings: What the run was started with, as JSON values; a run goes on only with the same.
        step: Optimizer steps done.
        extra_state: What else belongs to the run, by name: a discriminator and its optimizer.
    """

    model: ModelT
    average: ModelT | None
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    step: int = 0
    extra_state: Mapping[str, Stateful] = field(default_factory=dict)
    spread: ClassVar[bool] = False
    """Whether all processes must write and validate it together."""

    @property
    def notes(self) -> dict[str, Any]:
        """What is written beside the weights about how they came to be."""
        return {**self.settings, "steps_done": self.step}

    def save(self, path: Path) -> None:
        """Writes a checkpoint, entirely or not at all; `OSError` if it cannot be written."""
        write_state(path, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "beside": {name: part.state_dict() for name, part in self.extra_state.items()},
            "step": self.step,
            "settings": json.dumps(self.settings),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self.extra_state.items():
            part.load_state_dict(state["beside"][name])
        self.step = state["step"]

    def resume(self, path: Path) -> None:
        """Goes back to a checkpoint if there is one."""
        if path.exists():
            self.load(path)
            logger.info("going on from step %d of %s", self.step, path)

    def descend(
        self,
        loss: Tensor | Iterable[Tensor],
        rate: float,
        *,
        clip: float,
        ema: float,
        here: Processes | None = None,
    ) -> Tensor:
        """One optimizer step and one of the moving average; arguments as in `descend`.

        Args:
            loss: What to go down.
            rate: Learning rate of all weights.
            clip: Largest norm of the gradient.
            ema: Decay of the average; less in the first steps.
            here: The processes whose gradients are averaged.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            FloatingPointError: Loss or gradient is not finite.
        """
        weights = list(self.model.parameters())
        norm = descend(self.optimizer, weights, loss, rate, clip=clip, step=self.step, here=here)
        self.step += 1
        if self.average is not None:
            update_average(self.average, self.model, min(ema, self.step / (self.step + 10)))
        return norm

    @property
    def average_or_model(self) -> ModelT:
        """The weights that a run is for: the average, or the model where there is none."""
        return self.model if self.average is None else self.average

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            CheckpointError: It is damaged, of another shape, or of a run with other settings.
        """
        try:
            # On a GPU, AdamW's step counts would make every step wait for them.
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
            before = json.loads(state["settings"])
            differ = [
                f"{name} was {repr(before[name]) if name in before else 'not told'}, is {now!r}"
                for name, now in self.settings.items()
                if before.get(name) != now
            ]
            if differ:
                raise CheckpointError(
                    f"{path} is of a run with other settings: {'; '.join(differ)}. Go on with the "
                    "old ones, choose another folder, or remove it to start anew"
                )
            self.restore(state)
        except CheckpointError:
            raise
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            reason = reason_of(error)
            raise CheckpointError(
                f"{path} is damaged, or of another shape ({reason}); remove it to start anew"
            ) from None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint, entirely or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with complete(path, RuntimeError) as part:
        torch.save(state, part)


def descend(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[nn.Parameter],
    loss: Tensor | Iterable[Tensor],
    rate: float,
    *,
    clip: float,
    step: int,
    here: Processes | None = None,
) -> Tensor:
    """One optimizer step.

    Args:
        optimizer: The optimizer.
        weights: What it moves.
        loss: What to go down: a scalar, or parts of it, each of which is made only when it is its
            turn, so that there must be memory for one at a time.
        rate: Learning rate of all weights.
        clip: Largest norm of the gradient.
        step: Number of the step, for messages.
        here: The processes whose gradients are averaged; None where that is done elsewhere.

    Returns:
        The norm of the gradient before clipping.

    Raises:
        FloatingPointError: Loss or gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for part in [loss] if isinstance(loss, Tensor) else loss:
        check_finite(part, "loss", step)  # PyTorch's grid_sample crashes going back from NaN
        part.backward()
    if here is not None and here.size > 1:
        _average(weights, here)
    norm = nn.utils.clip_grad_norm_(weights, clip)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # of weights that are spread over processes
    check_finite(norm, "gradient", step)
    optimizer.step()
    return norm


def _average(weights: Sequence[nn.Parameter], here: Processes) -> None:
    """Replaces gradients by their means, some megabytes at once: each exchange costs a wait."""
    buckets: dict[int, list[nn.Parameter]] = {}
    before = 0
    for weight in weights:
        if weight.grad is not None:
            buckets.setdefault(before // _AT_ONCE, []).append(weight)
            before += weight.numel()
    for bucket in buckets.values():
        means = here.mean(torch.cat([w.grad.flatten() for w in bucket if w.grad is not None]))
        for weight, mean in zip(bucket, means.split([w.numel() for w in bucket]), strict=True):
            weight.grad = mean.view_as(weight)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the current ones; buffers are copied."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


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


_FREE = (
    "out",
    "device",
    "save_every",
    "validate_every",
    "validation_windows",
    "film_every",
    "log_every",
)


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, without what a run may change when it goes on."""
    values = described(dataclasses.asdict(config))
    return {name: value for name, value in values.items() if name not in _FREE}


def fingerprints(data: Sequence[Path]) -> list[str]:
    """What changes when the datasets in folders do: a run goes on only with the same data."""
    return [open_dataset(path).fingerprint()[:16] for path in data]


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
) -> torch.optim.AdamW:
    """AdamW over what is trained of a model, with weight decay on matrices only."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=betas,
    )


def warmup_cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then cosine decay to 2 % of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def warmup_constant(step: int, peak: float, warmup: int) -> float:
    """Learning rate of step `step`, from 0: linear warm-up, then `peak`."""
    return peak * min(1.0, (step + 1) / max(1, warmup))


def check_finite(
    value: Tensor,
    name: str,
    step: int,
    remedy: str = "lower learning_rate, or train with bfloat16=False",
) -> None:
    """Stops a run that diverges.

    Args:
        value: A single number.
        name: What it is.
        step: Optimizer steps done.
        remedy: What to do about it.

    Raises:
        FloatingPointError: The value is NaN or infinite.
    """
    if not torch.isfinite(value):
        raise FloatingPointError(f"the {name} of step {step} is {float(value.detach())}; {remedy}")


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


class Log:
    """Figures to `log.jsonl`, to TensorBoard where it is installed, and a progress bar on stderr.

    Args:
        folder: Folder of the run.
        step: Goes on after this step; what a killed run logged beyond it is dropped, at step 0
            everything.
        steps: Steps of the whole run.
        here: The processes of the run; only the main one writes.
        progress: Show a progress bar.

    Raises:
        ValueError: A line of an earlier log is damaged.
    """

    def __init__(
        self, folder: Path, step: int, steps: int, here: Processes, *, progress: bool
    ) -> None:
        self._bar = tqdm(total=steps, initial=step, disable=not (progress and here.main))
        self._file: TextIO | None = None
        self._board: Any = None
        if not here.main:
            return
        path = folder / "log.jsonl"
        kept = [entry for entry in json_lines(path) if entry.get("step", 0) <= step] if step else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("a")
        keep_tensorflow_out()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            logger.info("no TensorBoard log: pip install 'wmgym[train]'")

    def __enter__(self) -> Log:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the files and the bar."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, **shown: float) -> None:
        """One step further on the progress bar, with some figures beside it."""
        self._bar.update()
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text)

    def write(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Writes figures of a group, such as "train", at a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "group": group, **figures}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)


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
