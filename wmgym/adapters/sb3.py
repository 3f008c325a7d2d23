"""`SB3VecEnv`: a Gymnasium vector environment as stable-baselines3 knows them.

stable-baselines3 has an interface of its own for batches of environments: four return values, a
list of infos, and environments that reset themselves within the step that ends them. This adapter
translates one batched environment into it, row by row, so that all of its rows go on sharing one
model; nothing is copied per environment.

In the info of a row that has ended lie `terminal_observation` and `TimeLimit.truncated`, both
needed to bootstrap the value of a truncated episode, and, where success is known, `is_success`,
which stable-baselines3 logs as success rate, as it does the `episode` that Gymnasium's
`RecordEpisodeStatistics` adds. What belongs to the episode that has begun since, as its
`instruction`, is in `reset_infos`.

Letters: `B` environments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from wmgym.envs.infos import take_row
from wmgym.envs.vector import WorldModelVectorEnv
from wmgym.extras import keep_tensorflow_out, require

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv
else:
    keep_tensorflow_out()
    VecEnv = require("stable_baselines3.common.vec_env", "sb3").VecEnv

NUMERIC = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class SB3VecEnv(VecEnv):
    """A Gymnasium vector environment for stable-baselines3.

    Rewards are float32. Entries of dictionary observations that are not numbers, such as texts, are
    left out. Wrap it in stable-baselines3's `VecMonitor` to have episode returns logged.

    Args:
        env: A vector environment that resets in the same step and returns numpy arrays, or a number
            of environments `B`, for which a `WorldModelVectorEnv` is made.
        **kwargs: Arguments of that `WorldModelVectorEnv`.

    Attributes:
        env: The vector environment.
        reset_infos: `B` infos, what was said at the beginning of each current episode.

    Raises:
        TypeError: Arguments beside a vector environment that was made already.
        ValueError: Another autoreset mode, or observations without numbers.
        MissingExtraError: On import, if stable-baselines3 is not installed.

    Example:
        >>> from stable_baselines3 import PPO  # doctest: +SKIP
        >>> env = SB3VecEnv(64, reward="R3", horizon=8)  # doctest: +SKIP
        >>> PPO("MultiInputPolicy", env).learn(10_000)  # doctest: +SKIP
    """

    def __init__(self, env: VectorEnv | int, **kwargs: Any) -> None:
        if not isinstance(env, VectorEnv):
            env = WorldModelVectorEnv(
                env, **{"autoreset_mode": AutoresetMode.SAME_STEP, "output": "numpy", **kwargs}
            )
        elif kwargs:
            raise TypeError(
                f"{sorted(kwargs)} given beside an environment that was made already: give them to "
                "the environment, or give SB3VecEnv a number of environments"
            )
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the environment has autoreset_mode={mode}, but stable-baselines3 expects ended "
                "environments to reset within the step: make it with autoreset_mode='SameStep'"
            )
        self.env = env
        self._actions: NDArray | None = None
        self._succeeded = np.zeros(env.num_envs, np.bool_)
        space = _numeric(env.single_observation_space)
        super().__init__(env.num_envs, space, env.single_action_space)

    def reset(self) -> NDArray | dict[str, NDArray]:
        """Starts new episodes with the seeds of `seed` and the options of `set_options`.

        Returns:
            Observations of `B` environments; infos are in `reset_infos`.

        Raises:
            ValueError: Options whose keys differ between environments.
        """
        seed: Any = None if all(s is None for s in self._seeds) else list(self._seeds)
        observation, infos = self.env.reset(seed=seed, options=_merge(self._options))
        self._reset_seeds()
        self._reset_options()
        self._succeeded[:] = False
        self.reset_infos = [take_row(infos, row) for row in range(self.num_envs)]
        return self._select(observation)

    def step_async(self, actions: NDArray) -> None:
        """Keeps actions `(B, 7)` or `(B, T, 7)` for `step_wait`."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray | dict[str, NDArray], NDArray[np.float32], NDArray[np.bool_], list[dict]]:
        """Advances every environment by the actions given to `step_async`.

        Returns:
            Observations, rewards `(B,)`, dones `(B,)` and `B` infos. Where an episode has ended,
            the observation is the next one's first, and the info is that of the last step.
        """
        observation, rewards, terminated, truncated, vector = self.env.step(self._actions)
        dones = np.asarray(terminated | truncated)
        infos = [take_row(vector, row) for row in range(self.num_envs)]
        for row in np.flatnonzero(dones).tolist():
            began = self.reset_infos[row] = infos[row]
            final, last = began.pop("final_obs"), began.pop("final_info")
            infos[row] = {
                **last,
                **{key: began.pop(key) for key in ("episode",) if key in began},
                "terminal_observation": self._select(final),
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
            }
        for row, info in enumerate(infos):
            if "success" in info:
                self._succeeded[row] |= info["success"]
                info["is_success"] = bool(self._succeeded[row])
        self._succeeded &= ~dones
        return self._select(observation), np.asarray(rewards, np.float32), dones, infos

    def close(self) -> None:
        """Closes the vector environment."""
        self.env.close()

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """`B` rendered frames, Nones without a render mode."""
        frames: Any = self.env.render()
        return [None] * self.num_envs if frames is None else frames

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """An attribute of the vector environment, once for each of `indices`.

        What it does not have is looked up in `reset_infos`, for example `instruction`.

        Raises:
            AttributeError: It is in neither.
        """
        rows = self._get_indices(indices)
        owner = self._owner(attr_name)
        if owner is not None:
            return [getattr(owner, attr_name) for _ in rows]
        if all(attr_name in info for info in self.reset_infos):
            return [self.reset_infos[row][attr_name] for row in rows]
        raise AttributeError(f"{self.env} has no attribute {attr_name!r}, nor have its reset infos")

    def set_attr(
        self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None
    ) -> None:
        """Sets an attribute of the vector environment, which is one for all rows.

        Raises:
            ValueError: `indices` leave out some of the rows.
        """
        self._check_all(indices)
        setattr(self._owner(attr_name) or self.env.unwrapped, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: int | Iterable[int] | None = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Calls a method of the vector environment, once; its result is repeated for every row.

        Raises:
            ValueError: `indices` leave out some of the rows.
            AttributeError: There is no such method.
        """
        self._check_all(indices)
        owner = self._owner(method_name) or self.env
        result = getattr(owner, method_name)(*method_args, **method_kwargs)
        return [result] * self.num_envs

    def env_is_wrapped(
        self, wrapper_class: type, indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """Whether the vector environment is wrapped in `wrapper_class`, for each of `indices`."""
        env, found = self.env, False
        while isinstance(env, VectorWrapper):
            found = found or isinstance(env, wrapper_class)
            env = env.env
        return [found for _ in self._get_indices(indices)]

    def _owner(self, name: str) -> VectorEnv | None:
        """The outermost of the environment and its wrappers that has attribute `name`."""
        env = self.env
        while not hasattr(env, name):
            if not isinstance(env, VectorWrapper):
                return None
            env = env.env
        return env

    def _check_all(self, indices: int | Iterable[int] | None) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(
                f"indices={indices!r}: the {self.num_envs} environments are rows of one object, so "
                "attributes and methods are those of all; leave indices out, or use the vector "
                "environment itself, `.env`"
            )

    def _select(self, observation: Any) -> Any:
        """The numeric entries of one observation or of a batch."""
        if isinstance(self.observation_space, spaces.Dict):
            return {key: np.asarray(observation[key]) for key in self.observation_space}
        return np.asarray(observation)


def _numeric(space: spaces.Space) -> spaces.Space:
    """The space without the entries of a dictionary that are not numbers."""
    if isinstance(space, NUMERIC):
        return space
    entries = space.items() if isinstance(space, spaces.Dict) else ()
    kept: dict[str, spaces.Space] = {
        key: entry for key, entry in entries if isinstance(entry, NUMERIC)
    }
    if not kept:
        raise ValueError(
            f"observation space {space}: expected numbers, or a dictionary with entries that are"
        )
    return spaces.Dict(kept)


def _merge(options: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One array per key from every environment's options."""
    keys = sorted({key for of_row in options for key in of_row})
    partial = [key for key in keys if any(key not in of_row for of_row in options)]
    if partial:
        raise ValueError(f"reset options {partial} are given for some environments: give all one")
    return {key: np.array([of_row[key] for of_row in options]) for key in keys} or None
