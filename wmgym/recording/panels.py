"""One picture per control step of an imagined rollout.

Side by side: the frame imagined under the policy's actions, the one the same world imagines under
the recorded actions, the recorded one, and where the first differs from what it is compared with
(the imagined reference if there is one, else the recorded frame). Above them the instruction, below
them the reward so far. All pictures of a rollout have one size and one scale of difference, so they
can follow each other in a video.

Frames are `(H, W, 3)` uint8 RGB; steps count control steps, 0 being the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wmgym.recording import drawing

MARGIN = 24
GAP = 16
LEAST_SIDE = 224
"""Panels are enlarged by a whole number until their longer side has this many pixels."""
DIFFERENCE_LIMIT = 0.3
"""Difference, of 1, at which the colours end."""

POLICY_LABEL = "policy (imagined)"
REFERENCE_LABEL = "reference (imagined)"
RECORDED_LABEL = "recorded"
DIFFERENCE_LABEL = "difference"
COLOURS: dict[str, drawing.Colour] = {
    POLICY_LABEL: drawing.POLICY,
    REFERENCE_LABEL: drawing.REFERENCE,
    RECORDED_LABEL: drawing.RECORDED,
    DIFFERENCE_LABEL: drawing.DIFFERENCE,
}


@dataclass(frozen=True)
class StepFrames:
    """What is seen at one control step; frames of one size.

    Attributes:
        step: Control steps since the start.
        policy: `(H, W, 3)` uint8, imagined under the policy's actions.
        reference: Imagined under the recorded actions, or None.
        recorded: Recorded, or None.
    """

    step: int
    policy: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None = None
    recorded: NDArray[np.uint8] | None = None

    @property
    def target(self) -> NDArray[np.uint8] | None:
        """What the policy's frame is compared with."""
        return self.recorded if self.reference is None else self.reference

    @property
    def images(self) -> dict[str, NDArray[np.uint8]]:
        """The frames there are, by label."""
        frames = {
            POLICY_LABEL: self.policy,
            REFERENCE_LABEL: self.reference,
            RECORDED_LABEL: self.recorded,
        }
        return {label: frame for label, frame in frames.items() if frame is not None}

    @property
    def difference(self) -> NDArray[np.float32] | None:
        """`(H, W)` float32 in [0, 1]: |policy - target|, the mean over the colours."""
        return None if self.target is None else drawing.difference(self.policy, self.target)


class StepPicture:
    """Composes the pictures of one rollout.

    Args:
        title: Instruction; at most two lines of it are shown.
        detail: A line of small print below it.
        frames: Any step of the rollout: which frames there are and how large.
        steps: Control steps of the rollout, >= 1.
    """

    def __init__(self, title: str, detail: str, frames: StepFrames, steps: int) -> None:
        height, width = frames.policy.shape[:2]
        self._factor = max(1, -(-LEAST_SIDE // max(height, width)))
        self._panel = (width * self._factor, height * self._factor)
        self._steps = steps
        labels = [*frames.images, *([] if frames.target is None else [DIFFERENCE_LABEL])]
        right = MARGIN + len(labels) * (self._panel[0] + GAP) - GAP
        self._lefts = dict(zip(labels, range(MARGIN, right, self._panel[0] + GAP), strict=True))
        self._background = self._draw_background(title, detail, right + MARGIN)

    @property
    def size(self) -> tuple[int, int]:
        """`(H, W)` of the pictures."""
        return self._background.height, self._background.width

    def compose(
        self, frames: StepFrames, rewards: Sequence[float], terms: Mapping[str, float]
    ) -> NDArray[np.uint8]:
        """The picture `(H, W, 3)` uint8 of one step.

        Args:
            frames: The step; the same frames as at the start must be there.
            rewards: Rewards of the steps 1, 2, ... up to this one.
            terms: Terms of this step's reward, to be written beside it; may be empty.
        """
        picture = self._background.copy()
        for label, image in frames.images.items():
            panel = drawing.enlarge(image, self._factor, smooth=True)
            picture.paste(panel, (self._lefts[label], self._top))
        gap = frames.difference
        if gap is not None:
            left = self._lefts[DIFFERENCE_LABEL]
            colours = drawing.heat(gap, DIFFERENCE_LIMIT)
            panel = drawing.enlarge(colours, self._factor, smooth=False)
            picture.paste(panel, (left, self._top))
            text = f"mean {gap.mean():.4f}"
            at = (left + self._panel[0], self._top - 10)
            drawing.write(picture, at, text, size=13, colour=drawing.MUTED, anchor="rs")
        counter = f"step {frames.step} / {self._steps}"
        right = picture.width - MARGIN
        drawing.write(picture, (right, MARGIN + 18), counter, size=18, anchor="rs")
        if rewards:
            values = {"reward": rewards[-1], **terms}
            # Adding 0.0 turns a negative zero, as the reference earns it, into a plain one.
            text = "   ".join(f"{name} {value + 0.0:.4f}" for name, value in values.items())
            drawing.write(picture, (right, self._axes[1] - 14), text, size=14, anchor="rs")
        drawing.draw_trace(
            picture,
            self._axes,
            rewards,
            places=self._places,
            labels=step_labels(self._steps),
            current=frames.step,
        )
        return np.asarray(picture)

    def _draw_background(self, title: str, detail: str, width: int) -> Image.Image:
        """All that stays: title, labels, colour bar, names of the axes."""
        heading = drawing.Heading.fit(title, detail, width - 2 * MARGIN - 120)
        self._top = MARGIN + heading.height + 44
        under = self._top + self._panel[1]
        self._axes = (MARGIN + 52, under + 74, width - MARGIN, under + 74 + 110)
        first, last = self._axes[0] + 10, self._axes[2] - 10
        self._places = np.linspace(first, last, self._steps + 1).tolist()
        picture = Image.new("RGB", (width, self._axes[3] + 26 + MARGIN), drawing.PAPER)
        heading.draw(picture, MARGIN, MARGIN)
        draw = ImageDraw.Draw(picture)
        for label, left in self._lefts.items():
            right = left + self._panel[0] - 1
            draw.rectangle((left, self._top - 4, right, self._top - 2), fill=COLOURS[label])
            drawing.write(picture, (left, self._top - 10), label, size=15)
        if DIFFERENCE_LABEL in self._lefts:
            versus = "reference" if REFERENCE_LABEL in self._lefts else "recorded"
            place = (self._lefts[DIFFERENCE_LABEL], under + 8)
            draw_colour_bar(picture, place, self._panel[0], f"|policy - {versus}|")
        write_axis_names(picture, self._axes)
        return picture


def draw_colour_bar(
    picture: Image.Image, place: tuple[int, int], width: int, name: str = ""
) -> None:
    """The colours of differences from 0 to `DIFFERENCE_LIMIT` with their ends, 22 pixels high."""
    ramp = drawing.heat(np.linspace(0.0, DIFFERENCE_LIMIT, width), DIFFERENCE_LIMIT)
    picture.paste(Image.fromarray(np.repeat(ramp[None], 6, 0)), place)
    x, y = place[0], place[1] + 19
    drawing.write(picture, (x, y), "0", size=12, colour=drawing.MUTED)
    limit = str(DIFFERENCE_LIMIT)
    drawing.write(picture, (x + width, y), limit, size=12, colour=drawing.MUTED, anchor="rs")
    drawing.write(picture, (x + width / 2, y), name, size=12, colour=drawing.MUTED, anchor="ms")


def write_axis_names(picture: Image.Image, axes: tuple[int, int, int, int]) -> None:
    """Names the axes of a reward trace: "reward" above, "control step" below."""
    left, top, right, bottom = axes
    drawing.write(picture, (left - 52, top - 14), "reward", size=14)
    middle = (left + right) // 2
    drawing.write(picture, (middle, bottom + 34), "control step", size=13, anchor="ms")


def step_labels(steps: int) -> list[int]:
    """Steps 0, k, 2k, ... up to `steps`, about 16 of them, `k` being 1, 2 or 5 times 10^n."""
    return [round(t) for t in drawing.ticks(0, steps, most=16) if t <= steps and t == round(t)]
