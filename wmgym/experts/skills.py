"""Pick and place: closed-loop skills for everything that is grasped, moved and put down.

A skill is a generator of actions that returns whether it succeeded. It checks its own effect on
the privileged state (did the object rise, does LIBERO say it is in place) and tries again if not.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial

import numpy as np

from wmgym.experts.arm import ANY, CLOSE, OPEN, Action, Arm, Motion, Pose, Skill
from wmgym.experts.geometry import Array
from wmgym.experts.grasps import Chooser, Goal, Grasp, rim_grasp, side_grasp

_LIFT, _LIFTED = 0.12, 0.04
"""Height of a lift, and rise of the object after which a grasp counts as successful, metres."""


def pick(arm: Arm, name: str, choose: Chooser) -> Generator[Action, None, Grasp | None]:
    """Takes hold of an object and lifts it.

    Args:
        arm: The arm.
        name: The object.
        choose: Chooses the grasp, anew for each attempt.

    Returns:
        The grasp, or None if the object is still down after all attempts.
    """
    for _ in range(arm.attempts):
        grasp = choose(arm, name)
        if grasp is None:
            arm.log.append(f"no grasp of {name} found")
            return None
        if (yield from _grab(arm, name, grasp)):
            return grasp
        arm.log.append(f"missed {name}")
        yield from arm.hold("release", 6, OPEN)
    return None


def _grab(arm: Arm, name: str, grasp: Grasp) -> Skill:
    """One attempt at a grasp: approach, close, lift."""
    start = arm.scene.position(name)[2]
    yield from _approach(arm, name, grasp, arm.take_grasp_error())
    yield from arm.close()
    up = arm.scene.tip + _LIFT * grasp.back / grasp.back[2], grasp.frame
    yield from arm.move("lift", lambda: up, CLOSE, tol=0.015, rtol=ANY, steps=40, vmax=0.7)
    return bool(arm.scene.position(name)[2] - start > _LIFTED)


def _approach(arm: Arm, name: str, grasp: Grasp, error: Array) -> Motion:
    """From anywhere over the obstacles to the grasp, open fingers around the object."""
    scene, back = arm.scene, grasp.back

    def away(distance: float) -> Pose:
        return scene.position(name) + grasp.offset + error + distance * back, grasp.frame

    tip, _ = away(0.0)
    safe = max(scene.clearance(scene.tip[:2], tip[:2], skip=name) + 0.03, tip[2] + 0.07)
    safe += arm.vary(0.0, 0.05)
    far = (safe - tip[2]) / back[2]

    def above() -> Pose:
        x, y, z = away(far)[0]
        return np.array([x, y, min(z, max(arm.ceiling(scene.tip), tip[2] + 0.05))]), grasp.frame

    def at() -> Pose:
        return away(0.0)

    if scene.tip[2] < safe - 0.02:
        yield from arm.rise("transit", safe, OPEN, steps=120)
    yield from arm.move("transit", above, OPEN, tol=0.012, rtol=0.08, stall=25)
    yield from arm.move("approach", lambda: away(0.05), OPEN, stall=25)
    yield from arm.move("approach", at, OPEN, tol=0.004, steps=40, vmax=0.35, stall=6)


def carry(arm: Arm, name: str, grasp: Grasp, goal: Goal, height: float | None = None) -> Motion:
    """Brings the held object over its goal, above all obstacles on the way.

    Args:
        arm: The arm.
        name: The held object.
        grasp: How it is held.
        goal: Where its origin shall be.
        height: Height of the fingertips on the way; by default what the obstacles ask for.
    """
    scene = arm.scene
    hang = scene.tip[2] - scene.bounds(name)[0][2]
    if height is None:
        height = scene.clearance(scene.tip[:2], goal()[:2], skip=name) + 0.025 + hang
    height = max(height, goal()[2] + hang + 0.03) + arm.vary(0.0, 0.04)
    if scene.tip[2] < height - 0.01:
        start = scene.tip
        start[2] = max(start[2], min(height, arm.ceiling(start)))
        yield from arm.move(
            "carry", lambda: (start, grasp.frame), CLOSE, tol=0.02, rtol=ANY, steps=60
        )

    def over() -> Pose:
        x, y = (goal() + scene.tip - scene.position(name))[:2]
        return np.array([x, y, min(height, arm.ceiling(scene.tip))]), grasp.frame

    yield from arm.move("carry", over, CLOSE, tol=0.012, rtol=0.1, gain=0.4, stall=25)


def place(
    arm: Arm,
    name: str,
    grasp: Grasp,
    goal: Goal,
    *,
    drop: float = 0.006,
    lowest: float = -math.inf,
    vmax: float = 0.4,
) -> Motion:
    """Lowers the held object, lets go, and retreats upwards.

    Args:
        arm: The arm.
        name: The held object.
        grasp: How it is held.
        goal: Where its origin shall be.
        drop: Height above the goal at which the fingers open, metres.
        lowest: Height below which the fingertips must not go, metres.
        vmax: Speed limit of the descent.
    """
    scene = arm.scene

    def down() -> Pose:
        tip = goal() + scene.tip - scene.position(name)
        return np.array([tip[0], tip[1], max(tip[2] + drop, lowest)]), grasp.frame

    yield from arm.move("place", down, CLOSE, tol=0.006, rtol=ANY, steps=70, vmax=vmax, stall=8)
    yield from arm.hold("place", 2, CLOSE)
    yield from arm.release()
    yield from arm.rise("retreat", scene.tip[2] + 0.1, OPEN, steps=25)


def pick_and_place(
    arm: Arm,
    predicate: Sequence[str],
    choose: Chooser,
    goal: Goal,
    *,
    drop: float = 0.006,
    lowest: float = -math.inf,
) -> Skill:
    """Picks an object, puts it down at its goal, and checks.

    Args:
        arm: The arm.
        predicate: What shall hold in the end; its second word is the object.
        choose: Chooses the grasp.
        goal: Where the object's origin shall be.
        drop: As for `place`.
        lowest: As for `place`.
    """
    scene, name = arm.scene, predicate[1]
    for _ in range(arm.attempts):
        grasp = yield from pick(arm, name, choose)
        if grasp is None:
            continue
        yield from carry(arm, name, grasp, goal)
        if not holding(arm, name) or np.linalg.norm((scene.position(name) - goal())[:2]) > 0.08:
            arm.log.append(f"lost {name}")
            yield from arm.hold("release", 4, OPEN)
            continue
        yield from place(arm, name, grasp, goal, drop=drop, lowest=lowest)
        for wait in (0, 3):
            yield from arm.hold("retreat", wait, OPEN)
            if scene.holds(predicate):
                return True
        arm.log.append(f"{' '.join(predicate)} does not hold after placing")
    return False


def holding(arm: Arm, name: str) -> bool:
    """Whether the fingers are kept apart and the object is between or right below them."""
    fingers = arm.scene.fingers
    near = np.linalg.norm(arm.scene.position(name) - arm.scene.tip) < 0.16
    return bool(near and fingers[0] - fingers[1] > 0.002)


def put_in_basket(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Puts a small object on the floor of a basket: `in <object> <basket>_contain_region`."""
    _, name, region = predicate
    scene = arm.scene
    low, high = scene.bounds(region.removesuffix("_contain_region"))
    shift = _spread(arm, 0.006)

    def goal() -> Array:
        x, y, _ = scene.site(region) + shift
        return np.array([x, y, low[2] + 0.012 + _height(arm, name)])

    return (yield from pick_and_place(arm, predicate, side_grasp, goal, lowest=high[2] - 0.035))


def put_vessel_on(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Puts a bowl or mug on an object or a region: `on <vessel> <support>`."""
    _, _, support = predicate
    scene = arm.scene
    shift = _spread(arm, 0.006)
    if support in scene.objects:
        shift[2] = 0.004

    def goal() -> Array:
        return scene.target(support) + shift

    choose = partial(rim_grasp, goal=goal)
    return (yield from pick_and_place(arm, predicate, choose, goal))


def put_on(arm: Arm, predicate: Sequence[str], *, above: float = 0.0) -> Skill:
    """Puts a small object on an object or a region: `on <object> <support>`.

    Args:
        arm: The arm.
        predicate: What shall hold in the end.
        above: Extra height at which to let go, metres.
    """
    _, name, support = predicate
    shift = _spread(arm, 0.003)

    def goal() -> Array:
        x, y, z = arm.scene.target(support) + shift
        return np.array([x, y, z + _height(arm, name) + above])

    return (yield from pick_and_place(arm, predicate, side_grasp, goal))


def _height(arm: Arm, name: str) -> float:
    """Height of an object's origin above its lowest point, as it hangs or lies now."""
    return float(arm.scene.position(name)[2] - arm.scene.bounds(name)[0][2])


def _spread(arm: Arm, width: float) -> Array:
    """A random horizontal shift `(3,)` of at most `width` metres in x and in y."""
    return np.array([arm.vary(-width, width), arm.vary(-width, width), 0.0])
