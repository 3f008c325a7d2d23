"""A run that goes on where it was killed: all its state in one checkpoint, and a step of descent.

A checkpoint appears complete or not at all, is read without unpickling, and fits only the settings
it was made with.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from wmgym.checkpoints import CheckpointError, reason_of
from wmgym.distributed import Processes
from wmgym.files import complete
from wmgym.settings import described

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
CHECKPOINT = "checkpoint.pt"
_AT_ONCE = 2**20
_FREE = (
    "out",
    "device",
    "save_every",
    "validate_every",
    "validation_windows",
    "film_every",
    "log_every",
)


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
    if here is not None:
        average_gradients(weights, here)
    norm = nn.utils.clip_grad_norm_(weights, clip)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # of weights that are spread over processes
    check_finite(norm, "gradient", step)
    optimizer.step()
    return norm


def average_gradients(weights: Sequence[nn.Parameter], here: Processes) -> None:
    """Replaces gradients by their means over all processes.

    Some megabytes are exchanged at once, for each exchange costs a wait.
    """
    if here.size == 1:
        return
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


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration as JSON values, without what a run may change when it goes on."""
    values = described(dataclasses.asdict(config))
    return {name: value for name, value in values.items() if name not in _FREE}
