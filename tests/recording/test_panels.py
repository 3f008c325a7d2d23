"""Pictures of rollouts: sizes, what is shown where, any text, any size of frame."""

from __future__ import annotations

import numpy as np
import pytest

from wmgym.recording import StepFrames, StepPicture, compose_strip, drawing
from wmgym.recording.panels import DIFFERENCE_LIMIT
from wmgym.recording.strip import strip_steps

RED, GREEN, BLUE = (210, 20, 30), (20, 190, 40), (30, 20, 220)


def flat(colour, size=(40, 40)):
    return np.full((*size, 3), colour, np.uint8)


def at_step(step, size=(40, 40)):
    return StepFrames(step, flat(RED, size), flat(GREEN, size), flat(BLUE, size))


def count(picture, colour):
    return int((picture == np.array(colour, np.uint8)).all(-1).sum())


def test_all_panels_are_shown_enlarged():
    frames = at_step(1)
    picture = StepPicture("push", "toy", frames, steps=4).compose(frames, [-0.5], {"mae": 0.5})
    assert picture.dtype == np.uint8
    panel = (6 * 40) ** 2
    gap = np.abs(np.subtract(RED, GREEN)).mean() / 255
    assert gap > DIFFERENCE_LIMIT
    for colour in (RED, GREEN, BLUE):
        assert count(picture, colour) == panel
    assert count(picture, drawing.heat(np.array(1.0), 1.0)) >= panel


def test_all_steps_have_one_size():
    composer = StepPicture("push the square", "toy", at_step(0), steps=5)
    rewards = [-0.3, -1e-6, float("nan"), 200.0, float("-inf")]
    sizes = {composer.compose(at_step(t), rewards[:t], {}).shape for t in range(6)}
    assert sizes == {(*composer.size, 3)}


def test_composing_is_repeatable_and_follows_the_step():
    composer = StepPicture("push", "toy", at_step(0), steps=5)
    first = composer.compose(at_step(2), [-0.1, -0.2], {})
    other = composer.compose(at_step(3), [-0.1, -0.2, -0.3], {})
    np.testing.assert_array_equal(composer.compose(at_step(2), [-0.1, -0.2], {}), first)
    assert (first != other).any()


def test_panels_without_reference_compare_with_the_recording():
    both = at_step(0)
    alone = StepFrames(0, both.policy, None, both.recorded)
    np.testing.assert_array_equal(alone.difference, drawing.difference(alone.policy, flat(BLUE)))
    np.testing.assert_array_equal(both.difference, drawing.difference(both.policy, flat(GREEN)))
    narrow, wide = (StepPicture("push", "toy", f, 3) for f in (alone, both))
    assert narrow.size[1] == wide.size[1] - 240 - 16
    assert count(narrow.compose(alone, [], {}), GREEN) == 0
    only = StepFrames(0, both.policy)
    assert only.difference is None
    assert count(StepPicture("push", "toy", only, 3).compose(only, [], {}), RED) == 240**2


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (41, 39), (128, 128), (256, 256), (300, 200)])
def test_any_size_of_frame(size):
    frames = at_step(0, size)
    picture = StepPicture("push the square", "toy", frames, 2).compose(frames, [], {})
    factor = max(1, -(-224 // max(size)))
    assert count(picture, RED) == size[0] * size[1] * factor**2
    compose_strip("push the square", "toy", [frames], [])


@pytest.mark.parametrize(
    "title",
    [
        "",
        "   ",
        "word " * 500,
        "w" * 5000,
        "把方块推到 🟥 the café \u2013 “now”\n\tor\x00 never\ud800\u202e",
        "è" * 300,
    ],
)
def test_any_instruction(title):
    frames = at_step(1)
    composer = StepPicture(title, title, frames, 2)
    assert composer.size[0] <= StepPicture("a", "b", frames, 2).size[0] + 26
    composer.compose(frames, [-1.0], {})
    compose_strip(title, title, [at_step(0), frames], [-1.0])


def test_text_fits_and_says_when_it_is_cut():
    for text in ("word " * 100, "w" * 500, "a short one", "x"):
        for width in (40, 200, 1000):
            rows = drawing.wrap(text, 20, width, 2)
            assert 1 <= len(rows) <= 2
            assert all(drawing.font(20).getlength(row) <= width for row in rows)
            whole = " ".join(rows).replace(" ", "") == text.replace(" ", "")
            assert whole != rows[-1].endswith("…")
    assert drawing.wrap("put the bowl on the plate", 20, 125, 2) == ["put the bowl", "on the plate"]
    assert drawing.readable("café \u2013 naïve\n\n  x\u00b2") == "cafe - naive x2"


def test_difference_and_its_colours():
    left, right = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 255, np.uint8)
    np.testing.assert_array_equal(drawing.difference(left, right), np.ones((2, 3)))
    np.testing.assert_array_equal(drawing.difference(right, right), np.zeros((2, 3)))
    ramp = drawing.heat(np.linspace(0, 0.5, 64), 0.5).astype(int)
    brightness = ramp @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > 0).all()
    np.testing.assert_array_equal(drawing.heat(np.array(9.0), 0.5), ramp[-1])


@pytest.mark.parametrize(
    ("low", "high"), [(-0.093, 0), (0, 0), (-1e-7, 0), (-3e6, 12), (0, 7), (-0.3, 0.3)]
)
def test_ticks_span_the_values(low, high):
    marks = drawing.ticks(low, high)
    assert 2 <= len(marks) <= 5
    tiny = 1e-9 * (marks[-1] - marks[0])
    assert marks[0] <= low + tiny
    assert marks[-1] >= high - tiny
    assert 0 in marks
    np.testing.assert_allclose(np.diff(marks), marks[1] - marks[0])


def test_strip_has_a_column_per_step_and_a_row_per_kind():
    columns = [at_step(t) for t in (0, 4, 8)]
    rewards = [-0.1] * 8
    picture = compose_strip("push", "toy", columns, rewards)
    for colour in (RED, GREEN, BLUE):
        assert count(picture, colour) == 3 * 120**2
    wider = compose_strip("push", "toy", [*columns, at_step(9)], rewards)
    assert wider.shape == (picture.shape[0], picture.shape[1] + 126, 3)
    lower = compose_strip("push", "toy", [StepFrames(0, flat(RED), None, flat(BLUE))] * 3, rewards)
    assert lower.shape == (picture.shape[0] - 126, picture.shape[1], 3)
    with pytest.raises(ValueError, match="at least one step"):
        compose_strip("push", "toy", [], [])


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 12, 16, 100])
@pytest.mark.parametrize("columns", [2, 3, 8])
def test_shown_steps(steps, columns):
    shown = strip_steps(steps, columns)
    assert shown[0] == 0
    assert shown[-1] == steps
    assert len(shown) <= columns
    assert shown == sorted(set(shown))
    assert len(set(np.diff(shown[:-1]))) <= 1
