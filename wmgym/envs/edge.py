"""Between the caller and the tensors inside: actions in, observations and rewards out.

With `output="numpy"` everything comes out as numpy arrays, as Gymnasium's wrappers expect; with
"torch" tensors stay where they are. Whatever comes out is the caller's own memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import logger
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.infos import take_value
from wmgym.envs.state import EnvState
from wmgym.spaces import ACTION_DIM


class Edge:
    """Conversions of one vector environment.

    Args:
        output: "numpy" or "torch".
        device: Device of the world.
        action_shape: `(7,)` or `(T, 7)`.

    Raises:
        ValueError: Unknown `output`.
    """

    def __init__(self, output: str, device: torch.device, action_shape: tuple[int, ...]) -> None:
        if output not in ("numpy", "torch"):
            raise ValueError(f"output={output!r}: allowed are 'numpy' and 'torch'")
        self._torch = output == "torch"
        self._device = device
        self._action_shape = action_shape
        self._warned = False

    def actions(self, actions: Any, num_envs: int) -> Tensor:
        """Actions `(B, T, 7)` on the device, clipped to [-1, 1]; the first clipping warns.

        Tensors that are there stay there: one number leaves the device, the largest size.

        Raises:
            ValueError: Wrong shape, NaN or infinity.
        """
        if not isinstance(actions, Tensor):
            actions = torch.from_numpy(np.array(actions, np.float32))
        given = actions.detach().to(self._device, torch.float32)
        shape = (num_envs, *self._action_shape)
        if given.shape != shape:
            raise ValueError(f"actions have shape {tuple(given.shape)}, expected {shape}")
        largest = float(given.abs().max())
        if not math.isfinite(largest):
            where = (~given.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"actions contain NaN or infinity, first at index {where}")
        if largest > 1.0 and not self._warned:
            self._warned = True
            logger.warn(
                f"actions reach {largest:.3g} in size: values outside [-1, 1] are clipped, as "
                "LIBERO's controller does (this is said once)"
            )
        return given.clamp(-1.0, 1.0).reshape(num_envs, -1, ACTION_DIM)

    def tensor(self, values: Tensor) -> Any:
        """A tensor as the caller wants it; rewards and terms become float64 in numpy."""
        if self._torch:
            return values
        array = values.cpu().numpy()
        return array.astype(np.float64) if array.ndim == 1 else array

    def array(self, values: NDArray) -> Any:
        """An array as the caller wants it."""
        return torch.from_numpy(values).to(self._device) if self._torch else values

    def observation(self, state: EnvState) -> dict[str, Any]:
        """The observations of a state, in fresh memory."""
        return {
            "image": self.tensor(state.images.clone()),
            "proprio": self.tensor(state.proprio.clone()),
        }

    def single_observations(self, state: EnvState, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """The observations of `rows` one by one, as Gymnasium's `final_obs` holds them."""
        observation = self.observation(state)
        single = np.empty(len(rows), object)
        for i, row in enumerate(rows):
            single[i] = {key: take_value(value[row]) for key, value in observation.items()}
        return single

    def infos(self, values: dict[str, NDArray]) -> dict[str, Any]:
        """`Rollout.describe`'s values, with reference actions in the shape of the action space."""
        actions = values["reference_action"].reshape(-1, *self._action_shape)
        return {**values, "reference_action": self.array(actions)}
