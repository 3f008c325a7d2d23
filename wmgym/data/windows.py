"""Training windows: a few frames of the past, `T` actions, the frames they lead to.

The window at step `t` of an episode holds the frames `t - C + 1 ... t + T` (before the episode's
start, its first frame is repeated), the proprioception of the same steps, and the actions
`t ... t + T - 1`; frame `t + i` follows action `t + i - 1`. Windows exist for every `t` with
`t + T < N`, so no frame after the last observation is invented.

Which windows make up optimizer step `s` depends on `(seed, s)` alone: training that resumes at
step `s` sees what it would have seen.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wmgym.data.frame_cache import FrameCache


def window_starts(starts: NDArray[np.int64], horizon: int) -> NDArray[np.int64]:
    """Every step at which a window of `horizon` actions fits, over episodes laid end to end.

    Args:
        starts: `(E + 1,)` first step of each episode, and the total.
        horizon: Number of actions `T`, >= 1.

    Returns:
        `(W,)` ascending steps `t`, counted over all episodes.
    """
    ranges = [np.arange(a, b - horizon) for a, b in pairwise(starts)]
    return np.concatenate(ranges).astype(np.int64)


def window_rows(
    steps: NDArray[np.int64], starts: NDArray[np.int64], context: int, horizon: int
) -> NDArray[np.int64]:
    """Frame rows `(B, C + T)` of windows at `steps` `(B,)`, the past clamped to the episode."""
    first = starts[np.searchsorted(starts, steps, "right") - 1]
    rows = steps[:, None] + np.arange(1 - context, horizon + 1)
    return np.maximum(rows, first[:, None])


class WindowSampler:
    """Draws batches of windows out of a `FrameCache`.

    Args:
        cache: The decoded episodes.
        horizon: Number of actions `T`, >= 1.
        context: Number of past frames `C` including the one at `t`, >= 1.
        seed: Seed of the draws, >= 0.

    Raises:
        ValueError: `horizon` or `context` below 1, or no episode is longer than `horizon`.
    """

    def __init__(self, cache: FrameCache, *, horizon: int, context: int = 1, seed: int = 0) -> None:
        if horizon < 1 or context < 1:
            raise ValueError(f"horizon={horizon}, context={context}: allowed are integers >= 1")
        self.cache = cache
        self.horizon = horizon
        self.context = context
        self.seed = seed
        self._steps = window_starts(cache.starts, horizon)
        if not len(self._steps):
            longest = int(np.diff(cache.starts).max())
            raise ValueError(
                f"horizon={horizon}, but the longest episode has {longest} steps; allowed are "
                f"horizons below that"
            )

    def __len__(self) -> int:
        """Number of windows `W`."""
        return len(self._steps)

    def locate(self, index: int) -> tuple[int, int]:
        """Episode of the cache and step `t` within it of a window."""
        step = self._steps[index]
        episode = int(np.searchsorted(self.cache.starts, step, "right")) - 1
        return episode, int(step - self.cache.starts[episode])

    def indices(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """Windows `(batch_size,)` of optimizer step `step`, drawn with replacement."""
        return np.random.default_rng([self.seed, step]).integers(len(self), size=batch_size)

    def gather(
        self, indices: NDArray[np.int64], offsets: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray]:
        """Windows by index.

        Args:
            indices: `(B,)` windows in 0 ... W - 1.
            offsets: `(B, M)` future frames in 1 ... T to return; None returns all.

        Returns:
            `frames` `(B, C + M, H, W, 3)` uint8, the context first; `proprio` `(B, C + T, 8)`
            float32; `actions` and `clean_actions` `(B, T, 7)` float32; `offsets` `(B, M)` int64,
            the future step of each target frame, counted from 1.
        """
        steps = self._steps[indices]
        if offsets is None:
            offsets = np.tile(np.arange(1, self.horizon + 1), (len(steps), 1))
        rows = window_rows(steps, self.cache.starts, self.context, self.horizon)
        shown = np.concatenate([rows[:, : self.context], steps[:, None] + offsets], axis=1)
        taken = steps[:, None] + np.arange(self.horizon)
        return {
            "frames": np.asarray(self.cache.frames[shown]),
            "proprio": self.cache.proprio[rows],
            "actions": self.cache.actions[taken],
            "clean_actions": self.cache.clean_actions[taken],
            "offsets": offsets,
        }
