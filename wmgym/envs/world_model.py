"""`WorldModelEnv`: one imagined environment, the batch of one of `WorldModelVectorEnv`.

Both classes are importable from here, where the registered ids point to.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from wmgym.envs.infos import take_row, take_value
from wmgym.envs.state import EnvState
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.spaces import CONTROL_HZ, check_actions

__all__ = ["WorldModelEnv", "WorldModelVectorEnv"]


class WorldModelEnv(gym.Env):
    """Robot control imagined by a frozen world model, with a verified reward.

    Takes the keyword arguments of `WorldModelVectorEnv` except `num_envs`, `group_size` and
    `autoreset_mode`, and behaves as row 0 of it with the same seed. Environments of one process
    share the world's weights.

    Example:
        >>> import gymnasium as gym
        >>> env = gym.make("wmgym:WorldModel-LIBERO-v0", reward="R1")  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
        >>> env.step(info["reference_action"])[1]  # doctest: +SKIP
        0.0
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own annotation of this attribute is a plain dict
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        fixed = sorted({"num_envs", "group_size", "autoreset_mode"} & set(kwargs))
        if fixed:
            raise ValueError(f"{fixed} belong to the vector environment: use gymnasium.make_vec")
        self.vector = WorldModelVectorEnv(
            1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, **kwargs
        )
        self.metadata = {**self.metadata, "render_fps": self.vector.metadata["render_fps"]}
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    @property
    def instruction(self) -> str:
        """The task of the current episode in words."""
        return self.vector.starts[0].info.instruction

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts a new episode; see `WorldModelVectorEnv.reset`."""
        observation, infos = self.vector.reset(seed=seed, options=options)
        super().reset(seed=seed)
        return self._first(observation), take_row(infos, 0)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advances by one action `(7,)` or chunk `(T, 7)`; see `WorldModelVectorEnv.step`.

        Raises:
            ValueError: Wrong shape, NaN or infinity.
            ResetNeeded: The episode has ended, or none was started.
        """
        if isinstance(action, Tensor):
            action = action.detach().float().cpu().numpy()
        check_actions(action, self.action_space.shape or ())
        batch = np.asarray(action)[None]
        try:
            observation, reward, terminated, truncated, infos = self.vector.step(batch)
        except ResetNeeded:
            raise ResetNeeded("no episode is running: call reset() first") from None
        flags = (bool(terminated[0]), bool(truncated[0]))
        return self._first(observation), float(reward[0]), *flags, take_row(infos, 0)

    def render(self) -> NDArray[np.uint8] | None:
        """The imagined frame beside the one it is compared with, `(H, 2 W, 3)` uint8."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def get_state(self) -> EnvState:
        """A snapshot, see `WorldModelVectorEnv.get_state`."""
        return self.vector.get_state()

    def set_state(self, state: EnvState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a snapshot exactly; returns its observation and info."""
        observation, infos = self.vector.set_state(state)
        return self._first(observation), take_row(infos, 0)

    def close(self) -> None:
        """Lets go of states and caches; the world stays loaded for other environments."""
        self.vector.close()

    def _first(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {key: take_value(value[0]) for key, value in observation.items()}
