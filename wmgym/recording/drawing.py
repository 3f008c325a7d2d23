"""What the pictures are drawn with: colours, text that fits, difference colours, line plots.

The font is the one that comes with Pillow, so that a picture looks the same everywhere. It holds
ASCII and a few signs more: accents are dropped and other letters become "?".

Pictures are `PIL.Image.Image` in RGB; boxes are `(left, top, right, bottom)` in pixels.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

PAPER = (255, 255, 255)
INK = (28, 32, 40)
MUTED = (112, 119, 130)
RULE = (224, 227, 232)
POLICY = (37, 99, 206)
REFERENCE = (24, 138, 92)
RECORDED = (112, 119, 130)
DIFFERENCE = (200, 80, 30)

_HEAT = np.array([(10, 10, 32), (84, 20, 108), (196, 46, 84), (250, 146, 42), (255, 248, 196)])
_DRAWN_SIGNS = frozenset("·…\u2018\u2019\u201c\u201d")
_SMOOTHING = 3


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def readable(text: str) -> str:
    """The text on one line, in characters that the font has."""
    plain = []
    for char in unicodedata.normalize("NFKC", text):
        if char in _DRAWN_SIGNS or (char.isascii() and char.isprintable()):
            plain.append(char)
        elif unicodedata.category(char) == "Pd":
            plain.append("-")
        elif char.isspace():
            plain.append(" ")
        else:
            base = unicodedata.normalize("NFKD", char)[0]
            plain.append(base if base.isascii() and base.isprintable() else "?")
    return " ".join("".join(plain).split())


def wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """At most `lines` lines no wider than `width` pixels; what does not fit ends in an ellipsis."""
    rest = readable(text)
    rows: list[str] = []
    while rest and len(rows) < lines:
        count = _fitting(rest, size, width)
        if count < len(rest):
            if len(rows) == lines - 1:
                return [*rows, rest[: _fitting(rest, size, width, "…")].rstrip() + "…"]
            space = rest.rfind(" ", 1, count + 1)
            count = space if space > 0 else max(count, 1)
        rows.append(rest[:count])
        rest = rest[count:].lstrip()
    return rows


def _fitting(text: str, size: int, width: int, ending: str = "") -> int:
    """The most characters of `text` that fit, with `ending` after them, into `width` pixels."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font(size).getlength(text[:middle] + ending) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def write(
    picture: Image.Image,
    position: tuple[float, float],
    text: str,
    *,
    size: int,
    colour: Colour = INK,
    anchor: str = "ls",
) -> None:
    """Writes one line of text; `anchor` as in Pillow, by default the left end of the base line."""
    ImageDraw.Draw(picture).text(position, text, fill=colour, font=font(size), anchor=anchor)


@dataclass(frozen=True)
class Heading:
    """A title of up to two lines with a line of small print below.

    Attributes:
        title: Its lines.
        detail: Its lines, at most one.
    """

    title: list[str]
    detail: list[str]

    @classmethod
    def fit(cls, title: str, detail: str, width: int) -> Heading:
        """Breaks the texts to `width` pixels."""
        return cls(wrap(title, 20, width, 2), wrap(detail, 14, width, 1))

    @property
    def height(self) -> int:
        """Pixels from its top to its lowest base line."""
        return 18 + 26 * max(0, len(self.title) - 1) + 23

    def draw(self, picture: Image.Image, left: int, top: int) -> None:
        """Writes it."""
        for i, row in enumerate(self.title):
            write(picture, (left, top + 18 + 26 * i), row, size=20)
        for row in self.detail:
            write(picture, (left, top + self.height), row, size=14, colour=MUTED)


def difference(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`(H, W)` float32 in [0, 1]: |left - right|, the mean over the colours of `(H, W, 3)`."""
    gap = np.abs(left.astype(np.float32) - right.astype(np.float32))
    return gap.mean(-1) / np.float32(255.0)


def heat(values: NDArray[np.floating], limit: float) -> NDArray[np.uint8]:
    """Values `(...)` from 0 to `limit` as colours `(..., 3)` from night blue over red to cream."""
    place = np.clip(values / limit, 0.0, 1.0) * (len(_HEAT) - 1)
    stops = np.arange(len(_HEAT))
    return np.stack([np.interp(place, stops, c) for c in _HEAT.T], -1).round().astype(np.uint8)


def enlarge(image: NDArray[np.uint8], factor: int, *, smooth: bool) -> Image.Image:
    """An image `(H, W, 3)`, `factor` times larger, interpolated or with its pixels as squares."""
    height, width = image.shape[:2]
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(image).resize((width * factor, height * factor), method)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers that span `[low, high]`, about `most` of them: the limits and ticks of an axis.

    Steps are 1, 2 or 5 times a power of ten. Equal limits are pushed 0.01 apart, downwards.
    """
    low = low if high > low else high - 0.01
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw_trace(
    picture: Image.Image,
    box: Box,
    values: Sequence[float],
    *,
    places: Sequence[float],
    labels: Sequence[int],
    current: int | None = None,
) -> None:
    """Draws a line plot of one value per step; values that are not finite leave gaps.

    Args:
        picture: What to draw on.
        box: The axes; tick labels are written outside, to the left and below.
        values: Values of the steps 1, 2, ... so far.
        places: Horizontal pixel positions of the steps 0, 1, ... of the whole plot.
        labels: Steps that get a tick label.
        current: The step to mark, None for none.
    """
    left, top, right, bottom = box
    finite = [v for v in values if math.isfinite(v)]
    marks = ticks(min([0.0, *finite]), max([0.0, *finite]))
    scale = (bottom - top) / (marks[-1] - marks[0])
    draw = ImageDraw.Draw(picture)
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    for mark in marks:
        y = round(bottom - (mark - marks[0]) * scale)
        draw.line([(left, y), (right, y)], fill=MUTED if mark == 0 else RULE)
        write(picture, (left - 8, y), f"{mark:.{digits}f}", size=12, colour=MUTED, anchor="rm")
    for step in labels:
        write(picture, (places[step], bottom + 7), str(step), size=12, colour=MUTED, anchor="mt")
    if current is not None:
        draw.line([(places[current], top), (places[current], bottom)], fill=INK)
    points = {
        step: (places[step], bottom - (v - marks[0]) * scale)
        for step, v in enumerate(values, 1)
        if math.isfinite(v)
    }
    _draw_curve(picture, box, points, current)


def _draw_curve(
    picture: Image.Image,
    box: Box,
    points: dict[int, tuple[float, float]],
    current: int | None,
) -> None:
    """A line from step to step with a dot at each, the current one larger.

    Pillow draws hard edges: the region is drawn enlarged and averaged back.
    """
    pad = 8
    region = (box[0] - pad, box[1] - pad, box[2] + pad, box[3] + pad)
    part = picture.crop(region)
    large = part.resize((part.width * _SMOOTHING, part.height * _SMOOTHING), Image.Resampling.BOX)
    draw = ImageDraw.Draw(large)
    at = {
        step: ((x - region[0] + 0.5) * _SMOOTHING, (y - region[1] + 0.5) * _SMOOTHING)
        for step, (x, y) in points.items()
    }
    for step in at:
        if step + 1 in at:
            draw.line([at[step], at[step + 1]], fill=POLICY, width=2 * _SMOOTHING)
    for step, centre in at.items():
        draw.circle(centre, (5 if step == current else 2.5) * _SMOOTHING, fill=POLICY)
    picture.paste(large.reduce(_SMOOTHING), region[:2])
