"""What a world in training imagines, beside what was recorded.

A few episodes of the validation set, free-running: the world sees one frame of each and imagines
several horizons under the recorded actions, each from its own last frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wmgym.data import FrameCache
from wmgym.data.video import encode
from wmgym.files import complete
from wmgym.spaces import CONTROL_HZ
from wmgym.worlds.dynamics import READINGS
from wmgym.worlds.world import World


@torch.no_grad()
def film(
    world: World, cache: FrameCache, path: Path, *, episodes: int = 4, steps: int = 40
) -> None:
    """Writes an mp4: per episode one row, recorded | imagined | absolute difference.

    Args:
        world: The world.
        cache: Decoded episodes, of which evenly spread ones are shown from a third of their length.
        path: The mp4 file; it appears when it is complete.
        episodes: Rows of the picture.
        steps: Control steps.
    """
    lengths = np.diff(cache.starts)
    usable = np.flatnonzero(lengths > 2 * steps)
    if not len(usable):
        return
    chosen = usable[np.linspace(0, len(usable) - 1, min(episodes, len(usable))).astype(int)]
    first = cache.starts[chosen] + lengths[chosen] // 3
    rows = first[:, None] + np.arange(1 - READINGS, steps + 1)
    recorded = torch.from_numpy(cache.frames[rows]).movedim(-1, -3).float() / 255
    proprio = torch.from_numpy(cache.proprio[rows])
    actions = torch.from_numpy(cache.actions[rows[:, READINGS - 1 : -1]])
    _, imagined = world.step(world.start(recorded[:, :READINGS], proprio[:, :READINGS]), actions)
    real, dreamed = recorded[:, READINGS:], imagined.frames.cpu()
    columns = torch.cat([real, dreamed, (real - dreamed).abs()], dim=-1)
    with complete(path) as part:
        encode(part, stacked(columns), CONTROL_HZ)


def stacked(columns: Tensor) -> np.ndarray:
    """`(E, T, 3, H, W)` in [0, 1] to pictures `(T, E H, W, 3)` uint8."""
    pictures = columns.permute(1, 0, 3, 4, 2).flatten(1, 2)
    return (pictures * 255).round().to(torch.uint8).numpy()
