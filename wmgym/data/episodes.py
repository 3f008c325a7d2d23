"""One demonstration and a collection of them.

An `Episode` is what a dataset stores of one run of the robot: the observation before each action,
the action, and enough of the simulator to put it back there. A `Dataset` hands out episodes and
pieces of them by index. Readers (`wmgym.data.lerobot`, `wmgym.data.rlds`) implement it; models and
environments see only this. What lies in a folder is a `StoredDataset`.

Shapes: `N` steps in an episode, images `(N, H, W, 3)` uint8 turned by 180 degrees as in the
modified LIBERO RLDS data, proprioception `(N, 8)`, raw LIBERO actions `(N, 7)` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

HELD_OUT_INIT_STATES = range(40, 50)
"""Initial states of every LIBERO task that are kept for validation: never trained or tuned on."""

Split = Literal["train", "held_out", "all"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class EpisodeInfo:
    """What is known of an episode without reading its frames.

    Attributes:
        episode_id: Index in its dataset.
        length: Number of steps `N`.
        instruction: Task in words.
        suite: LIBERO suite, `""` when the data does not say.
        task_id: Index of the task in its suite, -1 when unknown.
        init_state_id: Index of LIBERO's stored initial state, -1 when unknown.
        seed: Seed of the simulator, the expert and its noise, -1 when unknown.
        success: Whether LIBERO's own success check held at the end; None when unknown.
        extra: Further entries of the dataset's episode table (fixture poses, noise level, ...).
    """

    episode_id: int
    length: int
    instruction: str
    suite: str = ""
    task_id: int = -1
    init_state_id: int = -1
    seed: int = -1
    success: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> bool:
        """Whether the episode is kept for reports: it starts from a held-out initial state.

        Where the initial state is not known, as in public datasets, every tenth episode is kept.
        """
        if self.init_state_id < 0:
            return self.episode_id % 10 == 9
        return self.init_state_id in HELD_OUT_INIT_STATES

    def is_in(self, split: Split) -> bool:
        """Whether the episode belongs to a split: "held_out", "train" (the others) or "all"."""
        return split == "all" or self.held_out == (split == "held_out")

    def validates(self, states: Collection[int]) -> bool:
        """Whether the episode is kept to watch training: it starts from one of `states`.

        Where the initial state is not known, every tenth episode is, others than the held-out ones.
        """
        if self.init_state_id < 0:
            return self.episode_id % 10 == 4
        return self.init_state_id in states


@dataclass(frozen=True)
class Episode:
    """Steps `start ... start + N` of an episode.

    Attributes:
        info: The whole episode's description.
        start: Index of the first step held here.
        images: `(N, H, W, 3)` uint8, third-person camera.
        proprio: `(N, 8)` float32.
        actions: `(N, 7)` float32, as executed.
        wrist_images: `(N, H, W, 3)` uint8 or None.
        clean_actions: `(N, 7)` float32, what the expert meant before noise, or None.
        sim_states: `(N, S)` float64 flattened MuJoCo states `[time, qpos, qvel]`, or None.
    """

    info: EpisodeInfo
    start: int
    images: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    actions: NDArray[np.float32]
    wrist_images: NDArray[np.uint8] | None = None
    clean_actions: NDArray[np.float32] | None = None
    sim_states: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Number of steps held."""
        return len(self.actions)


@runtime_checkable
class Dataset(Protocol):
    """A collection of episodes with random access to pieces of them."""

    @property
    def episodes(self) -> list[EpisodeInfo]:
        """Descriptions of all episodes, by index."""
        ...

    def read(
        self, episode_id: int, start: int = 0, stop: int | None = None, *, wrist: bool = False
    ) -> Episode:
        """Steps `start ... stop` of one episode; `stop=None` reads to its end.

        Raises:
            IndexError: No such episode or steps.
            DatasetError: The files are damaged.
        """
        ...


@runtime_checkable
class StoredDataset(Dataset, Protocol):
    """A dataset in a folder.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def name(self) -> str:
        """A short name of the dataset for reports."""
        ...

    @property
    def has_wrist(self) -> bool:
        """Whether there is a wrist camera."""
        ...

    def read_numbers(self, episode_id: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Proprioception `(N, 8)` and actions `(N, 7)` of an episode, without decoding images."""
        ...

    def fingerprint(self) -> str:
        """Hash that changes when the data change."""
        ...


def check_steps(
    episodes: Sequence[EpisodeInfo], episode_id: int, start: int, stop: int | None, where: Path
) -> tuple[int, int]:
    """The steps `start ... stop` that are asked for, `stop=None` being the episode's end.

    Raises:
        IndexError: No such episode or steps; the message names `where`.
    """
    if not 0 <= episode_id < len(episodes):
        raise IndexError(f"episode {episode_id} of {where}: allowed are 0 ... {len(episodes) - 1}")
    length = episodes[episode_id].length
    stop = length if stop is None else stop
    if not 0 <= start < stop <= length:
        raise IndexError(
            f"steps {start} ... {stop} of episode {episode_id} of {where}: expected "
            f"0 <= start < stop <= {length}"
        )
    return start, stop


class DatasetError(ValueError):
    """A dataset's files are missing, damaged or of a foreign format; the message says which."""
