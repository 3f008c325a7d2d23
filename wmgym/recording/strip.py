"""A rollout in one picture: a column per shown step, a row per kind of frame, the reward below.

Rows are those of the panels of `wmgym.recording.panels`; each point of the reward trace stands
below the step it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wmgym.recording import drawing, panels
from wmgym.recording.panels import MARGIN, StepFrames

LABELS_WIDTH = 104
LEAST_SIDE = 112
"""Frames are enlarged by a whole number until their longer side has this many pixels."""
CELL_GAP = 6


def strip_steps(steps: int, columns: int) -> list[int]:
    """At most `columns` >= 2 control steps to show: every k-th from the start, and the end."""
    stride = -(-steps // (columns - 1))
    return [*range(0, steps, stride), steps]


def compose_strip(
    title: str, detail: str, columns: Sequence[StepFrames], rewards: Sequence[float]
) -> NDArray[np.uint8]:
    """The picture `(H, W, 3)` uint8 of a rollout.

    Args:
        title: Instruction; at most two lines of it are shown.
        detail: A line of small print below it.
        columns: The steps to show, in order, all with the same frames of one size; >= 1.
        rewards: Rewards of the control steps 1, 2, ... of the rollout.

    Raises:
        ValueError: No columns.
    """
    if not columns:
        raise ValueError("columns is empty: a strip shows at least one step")
    height, width = columns[0].policy.shape[:2]
    factor = max(1, -(-LEAST_SIDE // max(height, width)))
    cell = (width * factor, height * factor)
    lefts = [MARGIN + LABELS_WIDTH + i * (cell[0] + CELL_GAP) for i in range(len(columns))]
    right = lefts[-1] + cell[0]
    heading = drawing.Heading.fit(title, detail, right - MARGIN)
    labels = list(columns[0].images)
    if columns[0].target is not None:
        labels.append(panels.DIFFERENCE_LABEL)
    first = MARGIN + heading.height + 40
    tops = {label: first + i * (cell[1] + CELL_GAP) for i, label in enumerate(labels)}
    under = max(tops.values()) + cell[1]
    axes = (lefts[0], under + 44, right, under + 44 + 90)

    picture = Image.new("RGB", (right + MARGIN, axes[3] + 40 + MARGIN), drawing.PAPER)
    heading.draw(picture, MARGIN, MARGIN)
    for label, top in tops.items():
        _write_label(picture, label, top, cell[1])
    for left, frames in zip(lefts, columns, strict=True):
        name = "start" if frames.step == 0 else f"step {frames.step}"
        middle = left + cell[0] // 2
        drawing.write(picture, (middle, first - 9), name, size=14, anchor="ms")
        for label, image in frames.images.items():
            picture.paste(drawing.enlarge(image, factor, smooth=True), (left, tops[label]))
        if frames.difference is not None:
            colours = drawing.heat(frames.difference, panels.DIFFERENCE_LIMIT)
            panel = drawing.enlarge(colours, factor, smooth=False)
            picture.paste(panel, (left, tops[panels.DIFFERENCE_LABEL]))
    shown = [frames.step for frames in columns]
    centres = [left + cell[0] / 2 for left in lefts]
    places = np.interp(np.arange(max(shown[-1], len(rewards)) + 1), shown, centres).tolist()
    drawing.draw_trace(picture, axes, rewards, places=places, labels=shown)
    panels.write_axis_names(picture, axes)
    return np.asarray(picture)


def _write_label(picture: Image.Image, label: str, top: int, height: int) -> None:
    """Names a row at its left: a bar in its colour, the name, what is in brackets smaller."""
    bar = (MARGIN, top, MARGIN + 2, top + height - 1)
    ImageDraw.Draw(picture).rectangle(bar, fill=panels.COLOURS[label])
    name, _, small = label.partition(" ")
    x, y = MARGIN + 12, top + height // 2
    drawing.write(picture, (x, y), name, size=15)
    drawing.write(picture, (x, y + 18), small, size=13, colour=drawing.MUTED)
    if label == panels.DIFFERENCE_LABEL:
        panels.draw_colour_bar(picture, (x, y + 12), LABELS_WIDTH - 32)
