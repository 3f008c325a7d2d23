"""Where imagined episodes start, and the recorded trajectory each is verified against.

A start is a step `f` of a recorded episode of `N` steps. The world gets the `C` frames up to `f`
(the first frame repeated before the episode's beginning); the reference is what was recorded from
there: action `f + k` and, after it, frame `f + k + 1`. The last recorded action has no frame after
it, so `N - 1 - f` control steps are left at `f`, and an imagined episode lasts `min(horizon, N - 1
- f)`.

Only successful episodes serve as references: a failed demonstration is no target.

Shapes: `C` context frames, `S` control steps of the imagined episode, images `(H, W, 3)` uint8.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmgym.cache import ByteCache
from wmgym.data.episodes import SPLITS, Dataset, EpisodeInfo, Split
from wmgym.data.frame_cache import resize
from wmgym.spaces import check_tasks

StartFunction = Callable[[np.random.Generator, Sequence[EpisodeInfo]], tuple[int, int]]
"""Chooses a start: `(rng, eligible episodes) -> (episode_id, frame_index)`."""


@dataclass(frozen=True)
class Start:
    """A step of a recorded episode with what precedes and follows it.

    Attributes:
        info: The episode.
        frame_index: Step `f` of the episode.
        steps: Control steps `S` that the imagined episode lasts.
        context_images: `(C, H, W, 3)` uint8, oldest first; the last one is frame `f`.
        context_proprio: `(C, 8)` float32.
        images: `(S, H, W, 3)` uint8; `images[k]` was recorded after `actions[k]`.
        actions: `(P, 7)` float32 in [-1, 1], `P` = horizon rounded up to chunks plus one chunk,
            from step `f` on; past the episode's end its last action is repeated.
    """

    info: EpisodeInfo
    frame_index: int
    steps: int
    context_images: NDArray[np.uint8]
    context_proprio: NDArray[np.float32]
    images: NDArray[np.uint8]
    actions: NDArray[np.float32]

    @property
    def key(self) -> tuple[int, int]:
        """`(episode_id, frame_index)`."""
        return self.info.episode_id, self.frame_index

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = (self.context_images, self.context_proprio, self.images, self.actions)
        return sum(a.nbytes for a in arrays)


class StartStates:
    """Draws starts from a dataset and reads them.

    Args:
        dataset: Recorded episodes.
        suite: Episodes of this suite are eligible, and those whose suite is unknown.
        tasks: Eligible task ids, or None for all.
        split: "train" (no held-out initial states), "held_out" (only those) or "all".
        starts: "frames": uniform over all steps of eligible episodes with `horizon` steps left; an
            episode too short for that offers its first step. "episodes": the first step of a
            uniformly drawn episode. Or a function `(rng, episodes) -> (episode_id, frame_index)`.
        horizon: Control steps of an imagined episode, >= 1.
        chunk: Control steps of an environment step.
        context: Context frames `C` of the world.
        image_size: `(H, W)` of the world, to which recorded images are resized.
        cache: Keeps what was read.
        every: Imagined episodes last for a multiple of so many control steps.
        intended: Actions are those that the demonstrator meant, where the dataset tells.

    Attributes:
        episodes: The eligible episodes.
        digest: Hash of the descriptions of all episodes.

    Raises:
        ValueError: An unknown split or kind of start, or no eligible episode.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        suite: str,
        tasks: Sequence[int] | None,
        split: Split,
        starts: str | StartFunction,
        horizon: int,
        chunk: int,
        context: int,
        image_size: tuple[int, int],
        cache: ByteCache,
        every: int = 1,
        intended: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: allowed are {', '.join(map(repr, SPLITS))}")
        if not callable(starts) and starts not in ("frames", "episodes"):
            raise ValueError(f"starts={starts!r}: allowed are 'frames', 'episodes' or a function")
        self._dataset = dataset
        self._kind = starts
        self._every = every
        self._intended = intended
        self._horizon = horizon
        self._padded = -(-horizon // chunk) * chunk + chunk
        self._context = context
        self._image_size = image_size
        self._cache = cache
        self._by_id = {e.episode_id: e for e in dataset.episodes}
        self.digest = hashlib.sha256(repr(dataset.episodes).encode()).hexdigest()[:12]
        tasks = None if tasks is None else check_tasks(tasks)
        self.episodes = [
            e for e in dataset.episodes if e.length > every and _eligible(e, suite, tasks, split)
        ]
        if not self.episodes:
            raise ValueError(
                f"no successful episode of suite={suite!r}, tasks={tasks!r}, split={split!r} with "
                f"more than {every} steps among {len(self._by_id)}; the dataset has "
                f"{_summary(dataset.episodes)}"
            )
        self._cumulative = np.cumsum([self._choices(e) for e in self.episodes])

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draws `(episode_id, frame_index)`; `rng` is its only randomness."""
        if callable(self._kind):
            given = self._kind(rng, tuple(self.episodes))
            try:
                episode_id, frame_index = map(operator.index, given)
            except (TypeError, ValueError):
                raise ValueError(
                    f"the start function returned {given!r}, expected the two integers "
                    "(episode_id, frame_index)"
                ) from None
            return self.check(episode_id, frame_index)
        if self._kind == "episodes":
            return self.episodes[rng.integers(len(self.episodes))].episode_id, 0
        drawn = int(rng.integers(self._cumulative[-1]))
        index = int(np.searchsorted(self._cumulative, drawn, side="right"))
        before = int(self._cumulative[index - 1]) if index else 0
        return self.episodes[index].episode_id, drawn - before

    def choose(
        self, rng: np.random.Generator, episode_id: int | None, frame_index: int | None
    ) -> tuple[int, int]:
        """The start that was asked for, what was not asked for being drawn.

        Given an episode alone, its step is drawn if starts are "frames", otherwise it is the first.

        Raises:
            ValueError: As in `check`.
        """
        if episode_id is None:
            return self.draw(rng)
        if frame_index is None:
            self.check(episode_id, 0)
            choices = self._choices(self._by_id[episode_id])
            frame_index = int(rng.integers(choices)) if self._kind == "frames" else 0
        return self.check(episode_id, frame_index)

    def check(self, episode_id: int, frame_index: int) -> tuple[int, int]:
        """Validates a start; any episode of the dataset may be asked for, eligible or not.

        Raises:
            ValueError: No such episode, or no control step is left at that frame.
        """
        info = self._by_id.get(episode_id)
        if info is None:
            raise ValueError(
                f"episode_id={episode_id!r}: the dataset has {len(self._by_id)} episodes, ids "
                f"{min(self._by_id)} to {max(self._by_id)}"
            )
        last = info.length - 1 - self._every
        if not 0 <= frame_index <= last:
            raise ValueError(
                f"frame_index={frame_index!r}: episode {episode_id} has {info.length} steps, so "
                f"0 to {last} are allowed (recorded steps that must follow: {self._every})"
            )
        return int(episode_id), int(frame_index)

    def load(self, episode_id: int, frame_index: int) -> Start:
        """Reads a start that passed `check`, from the cache if it is there."""
        key = ("start", episode_id, frame_index)
        start = self._cache.get(key)
        if start is None:
            start = self._read(episode_id, frame_index)
            self._cache.put(key, start, start.nbytes)
        return start

    def _read(self, episode_id: int, f: int) -> Start:
        info = self._by_id[episode_id]
        steps = min(self._horizon, info.length - 1 - f)
        steps -= steps % self._every
        first = max(0, f - self._context + 1)
        piece = self._dataset.read(episode_id, first, min(info.length, f + self._padded))
        images = resize(piece.images, self._image_size)
        meant = piece.clean_actions if self._intended else None
        actions = piece.actions if meant is None else meant
        now = f - first
        context = np.maximum(np.arange(now - self._context + 1, now + 1), 0)
        later = np.minimum(np.arange(now, now + self._padded), len(piece) - 1)
        return Start(
            info=info,
            frame_index=f,
            steps=steps,
            context_images=images[context],
            context_proprio=piece.proprio[context].astype(np.float32),
            images=images[now + 1 : now + 1 + steps].copy(),
            actions=np.clip(actions[later].astype(np.float32), -1.0, 1.0),
        )

    def _choices(self, episode: EpisodeInfo) -> int:
        return max(1, episode.length - self._horizon)


def _eligible(episode: EpisodeInfo, suite: str, tasks: Sequence[int] | None, split: Split) -> bool:
    return (
        episode.suite in ("", suite)
        and (tasks is None or episode.task_id in tasks)
        and episode.is_in(split)
        and episode.success is not False
    )


def _summary(episodes: Sequence[EpisodeInfo]) -> str:
    suites = sorted({e.suite or "unknown" for e in episodes})
    tasks = sorted({e.task_id for e in episodes})
    held_out = sum(e.held_out for e in episodes)
    return f"suites {suites}, task ids {tasks}, {held_out} held-out episodes"
