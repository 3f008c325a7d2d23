"""Who acts in an evaluation: a `FlowVLA`, or an object with `reset` and `act` of a user's module.

Everything that can be wrong with a policy is found here, in the calling process, before a simulator
starts. A policy of files is known by a digest of them, so that results of other weights under the
same name are never taken for its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmgym.checkpoints import CONFIG, WEIGHTS, digest_of, model_folder
from wmgym.distributed import resolve_device
from wmgym.settings import function_of
from wmgym_agents.policy import STATISTICS, FlowVLA, Observation


class Policy(Protocol):
    """What can be evaluated.

    A policy that knows the size of its pictures may say so by an attribute `image_size`.
    """

    def reset(self, seed: int) -> None:
        """Begins an episode; a policy that draws must draw from this seed."""

    def act(self, observation: Observation) -> NDArray[np.floating]:
        """A chunk `(1, T, 7)` of raw LIBERO actions for one observation."""


def _is_function(policy: str) -> bool:
    """Whether a policy is made by a function `module:function`."""
    return ":" in policy and not Path(policy).exists()


def load_policy(policy: str, *, temperature: float = 1.0, device: str = "auto") -> Policy:
    """A policy by name, folder, or `module:function` that makes it.

    Modules are also looked for in the working directory.

    Args:
        policy: The policy.
        temperature: Size of the noise that a `FlowVLA` denoises.
        device: Where a `FlowVLA` runs: "auto" (CUDA where there is some), "cpu" or "cuda".

    Raises:
        CheckpointError: There is no such policy, or its files are damaged.
        ValueError: There is no such function or device, or what the function makes is no policy.
        RuntimeError: The function failed; its own error is the cause.
    """
    place = resolve_device(device)
    made = _made(policy) if _is_function(policy) else FlowVLA.from_pretrained(policy)
    if isinstance(made, FlowVLA):
        made.temperature = temperature
        return made.to(place).eval()
    missing = [name for name in ("reset", "act") if not callable(getattr(made, name, None))]
    if missing:
        raise ValueError(
            f"policy={policy!r} makes a {type(made).__name__} without {' and '.join(missing)}: "
            "return a FlowVLA, or an object with reset(seed) and act(observation)"
        )
    return made


def _made(policy: str) -> Any:
    """What a user's function makes."""
    try:
        function = function_of(policy)
    except ValueError as error:
        raise ValueError(f"policy={policy!r} cannot be made: {error}") from error
    try:
        return function()
    except Exception as error:
        raise RuntimeError(f"policy={policy!r} cannot be made: {policy}() failed") from error


def digest(policy: str) -> str | None:
    """Digest of a policy's weights, shape and statistics; None where a function makes it.

    Raises:
        CheckpointError: There is no such policy.
    """
    if _is_function(policy):
        return None
    folder = model_folder("policy", policy)
    return digest_of(folder / name for name in (CONFIG, STATISTICS, WEIGHTS))
