"""Films of failed episodes: every step, and what was asked for and came of it written above."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmgym.recording import drawing
from wmgym.recording.video import VideoWriter
from wmgym.spaces import CONTROL_HZ

_WIDTH, _MARGIN = 384, 12


def film(path: Path, frames: NDArray[np.uint8], instruction: str, detail: str) -> None:
    """Writes a film.

    Args:
        path: The mp4 file; its folder is made if missing.
        frames: `(n, H, W, 3)`, the start and one for each step.
        instruction: The task in words.
        detail: A line of small print.
    """
    factor = max(1, round(_WIDTH / frames.shape[2]))
    width = factor * frames.shape[2]
    heading = drawing.Heading.fit(instruction, detail, max(width, _WIDTH) - 2 * _MARGIN)
    top = heading.height + 2 * _MARGIN
    size = (max(width, _WIDTH), top + factor * frames.shape[1])
    background = Image.new("RGB", size, drawing.PAPER)
    heading.draw(background, _MARGIN, _MARGIN)
    with VideoWriter(path, CONTROL_HZ) as video:
        for frame in frames:
            picture = background.copy()
            enlarged = drawing.enlarge(frame, factor, smooth=True)
            picture.paste(enlarged, ((size[0] - width) // 2, top))
            video.write(np.asarray(picture))
