"""Clips that the tokenizer and the dynamics are trained on, out of a frame cache.

A clip is a context frame and the frames f0 ... fT of a window; the context is f0 itself, or, to
make a tokenizer bear a greater distance, a frame some steps before it. What a clip shows depends on
its window and on a seed of its own, never on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmgym.data import FrameCache, WindowSampler
from wmgym.worlds.tokens.augment import random_view


class Clips:
    """Clips of a frame cache.

    Args:
        cache: The decoded episodes.
        frames: Frames of a window, f0 ... fT, >= 2.
        seed: Seed of the choice of windows.
        device: Where clips go.
        lead: Most steps that the context frame comes before f0.
        augment: Whether clips with seeds are cropped and coloured at random.

    Raises:
        ValueError: No episode is long enough.
    """

    def __init__(
        self,
        cache: FrameCache,
        frames: int,
        seed: int,
        device: torch.device,
        *,
        lead: int = 0,
        augment: bool = False,
    ) -> None:
        self.cache, self.device = cache, device
        self.lead, self.augment = lead, augment
        self.sampler = WindowSampler(cache, horizon=frames - 1, seed=seed)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.sampler)

    @property
    def varied(self) -> bool:
        """Whether a window looks different under other seeds."""
        return self.augment or self.lead > 0

    def spread(self, count: int) -> NDArray[np.int64]:
        """Up to `count` windows, evenly spread."""
        return np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)

    def pictures(self, rows: Iterable[int], seeds: Sequence[int] | None = None) -> Tensor:
        """Clips of windows, `(B, 1 + T + 1, 3, H, W)` in [0, 1].

        Args:
            rows: The windows `(B,)`.
            seeds: One for every clip; None takes f0 as the context and changes nothing.
        """
        clips = []
        for i, row in enumerate(rows):
            rng = None if seeds is None else np.random.default_rng(seeds[i])
            first, step = self._place(row)
            back = 0 if rng is None else int(rng.integers(self.lead + 1))
            shown = [max(step - back, first), *range(step, step + self.sampler.horizon + 1)]
            pixels = torch.from_numpy(np.asarray(self.cache.frames[shown])).to(self.device)
            clip = pixels.movedim(-1, 1).float() / 255
            clips.append(clip if rng is None or not self.augment else random_view(clip, rng))
        return torch.stack(clips)

    def actions(self, rows: Iterable[int]) -> Tensor:
        """Actions `(B, T, 7)` of windows."""
        steps = np.array([self._place(row)[1] for row in rows])
        taken = steps[:, None] + np.arange(self.sampler.horizon)
        return torch.from_numpy(self.cache.actions[taken]).to(self.device)

    def _place(self, row: int) -> tuple[int, int]:
        """First step of a window's episode, and its own, both counted over all episodes."""
        episode, step = self.sampler.locate(row)
        first = int(self.cache.starts[episode])
        return first, first + step
