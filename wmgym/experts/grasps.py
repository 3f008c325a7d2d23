"""Where to take hold of an object, decided on the scene's collision boxes.

Two kinds of grasp cover LIBERO's objects: across the narrowest side of a box, can or bottle, and
across the rim of a bowl or mug. Candidates at 24 angles around the object are priced by what they
would hit, by how far the wrist has to turn and by how far the arm has to stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wmgym.experts.arm import Arm
from wmgym.experts.geometry import GRIPPER_DOWN, Array, lean, rot_z, wrap

_WIDEST = 0.074
"""Widest object that the open fingers take, metres."""

_FAR = 0.65
"""Stretch of the arm that is better avoided, metres."""

_UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Grasp:
    """A gripper pose relative to an object.

    Attributes:
        offset: Fingertips relative to the object's origin, in world axes `(3,)`.
        frame: Orientation of the gripper `(3, 3)`.
    """

    offset: Array
    frame: Array

    @property
    def back(self) -> Array:
        """Unit vector away from the object, against the approach `(3,)`."""
        return -self.frame[:, 2]


Goal = Callable[[], Array]
"""Where the origin of the held object shall be `(3,)`, now."""

Chooser = Callable[[Arm, str], Grasp | None]
"""Chooses a grasp of the named object, or finds none."""


def side_grasp(arm: Arm, name: str) -> Grasp | None:
    """A grasp from above across the narrowest horizontal direction, or None if all are too wide."""
    scene = arm.scene
    points = scene.points(name)
    low, high = points[:, 2].min(), points[:, 2].max()
    z = max(low + 0.008, high - (0.032 if high - low > 0.05 else 0.014))
    band = points[points[:, 2] > z - 0.02]
    best: tuple[float, Array, float] | None = None
    for yaw in np.linspace(-math.pi / 2, math.pi / 2, 25)[:-1]:
        along, across, _ = rot_z(yaw).T
        extent, reach = band @ across, points @ along
        width = float(np.ptp(extent))
        if width > _WIDEST:
            continue
        tip = (extent.max() + extent.min()) / 2 * across + (reach.max() + reach.min()) / 2 * along
        tip = np.array([tip[0], tip[1], z])
        hits = scene.collisions(tip, rot_z(yaw) @ GRIPPER_DOWN, skip=name)
        cost = 0.5 * abs(yaw) + 20 * max(0.0, width - 0.05) + 0.5 * hits + arm.vary(0.0, 0.25)
        if best is None or cost < best[0]:
            best = (cost, tip, yaw)
    if best is None:
        return None
    _, tip, yaw = best
    arm.log.append(f"side grasp of {name}, yaw {math.degrees(yaw):.0f}")
    return Grasp(tip - scene.position(name), rot_z(yaw) @ GRIPPER_DOWN)


def rim_grasp(
    arm: Arm, name: str, *, goal: Goal, side: float | None = None, tilt: float = 0.0
) -> Grasp:
    """A grasp with one finger inside a round vessel and one outside.

    Args:
        arm: The arm.
        name: The vessel.
        goal: Where it shall go: the arm has to reach that, too.
        side: Direction (radians, world) from its centre in which to take the rim; any if None.
        tilt: Angle by which the hand leans outwards, radians.
    """
    scene = arm.scene
    points = scene.points(name)
    low, high = points.min(0), points.max(0)
    center = (low + high) / 2
    top = points[points[:, 2] > high[2] - 0.012]
    radius = np.linalg.norm((top - center)[:, :2], axis=1).max() - 0.006
    way = goal() - scene.position(name)
    best: tuple[float, Array, float] | None = None
    for direction in np.linspace(-math.pi, math.pi, 25)[:-1]:
        x, y = center[:2] + radius * np.array([math.cos(direction), math.sin(direction)])
        tip = np.array([x, y, high[2] - 0.018])
        # The fingers are alike, so half a turn of the wrist is never needed.
        yaw = wrap(direction - math.pi / 2, math.pi)
        if side is None:
            frame = rot_z(yaw) @ GRIPPER_DOWN
            heights = (0.0, 0.04, 0.08, 0.12)
            hits = sum(scene.collisions(tip + h * _UP, frame, skip=name) for h in heights)
            cost = 0.6 * abs(yaw) + 0.5 * hits
        else:
            cost = 1.8 * abs(wrap(direction - side))
        above = tip + 0.08 * _UP
        stretch = max(arm.stretch(above), arm.stretch(above + way))
        cost += 30 * max(0.0, stretch - _FAR) + arm.vary(0.0, 0.5)
        if best is None or cost < best[0]:
            best = (cost, tip, direction)
    assert best is not None  # the loop is never empty
    _, tip, direction = best
    arm.log.append(f"rim grasp of {name}, side {math.degrees(direction):.0f}")
    yaw = wrap(direction - math.pi / 2, math.pi)
    return Grasp(tip - scene.position(name), lean(direction, tilt) @ rot_z(yaw) @ GRIPPER_DOWN)
