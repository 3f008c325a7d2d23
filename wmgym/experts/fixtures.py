"""Skills on fixtures and skills by contact: drawers, knobs, pushing, and the wine rack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from wmgym.experts.arm import ANY, CLOSE, OPEN, Arm, Motion, Pose, Skill
from wmgym.experts.geometry import GRIPPER_DOWN, Array, lean, rot_x, rot_z, wrap
from wmgym.experts.grasps import rim_grasp, side_grasp
from wmgym.experts.skills import carry, pick, pick_and_place, place

_DRAWER_TRAVEL = 0.165
_DRAWER_OPEN = 0.141
"""Travel (m) from which LIBERO calls a drawer open, and a little more than it can move."""

_KNOB_TURN, _KNOB_MOST = 0.95, 1.4
"""How far one twist goes, and the joint position at which the wrist stops, radians."""

_RACK_LEAN = 0.9
_RACK_OFFSET = np.array([-0.07, -0.02, 0.03])
"""Lean (rad) that lays a bottle along the rack, and its origin relative to the rack's site (m)."""


class Drawer:
    """One drawer of a cabinet, named by its region (`wooden_cabinet_1_top_region`)."""

    def __init__(self, arm: Arm, region: str) -> None:
        self.arm, self.region = arm, region
        cabinet, level, _ = region.rsplit("_", 2)
        self._joint, self._body = f"{cabinet}_{level}_level", f"{cabinet}_cabinet_{level}"

    @property
    def out(self) -> Array:
        """Unit vector in which the drawer opens `(3,)`."""
        return -self.arm.scene.joint_axis(self._joint)

    @property
    def opening(self) -> float:
        """How far it is open, metres."""
        return -self.arm.scene.joint(self._joint)

    def handle(self) -> Array:
        """Centre of the handle: the box that sticks out furthest `(3,)`."""
        centers, _ = self.arm.scene.part_boxes(self._body)
        return centers[np.argmax(centers @ self.out)].copy()

    def resting_place(self) -> Array:
        """Where a bowl's origin goes: just behind the front panel, on the floor `(3,)`."""
        _, corners = self.arm.scene.part_boxes(self._body)
        panel = (corners @ self.out).max() - 0.045  # the handle sticks out that far
        spot = self.arm.scene.site(self.region)
        spot += (panel - 0.062 - spot @ self.out) * self.out
        return np.array([spot[0], spot[1], corners[..., 2].min() + 0.02])


def open_drawer(arm: Arm, region: str) -> Skill:
    """Pulls a drawer open by its handle, the gripper horizontal.

    Args:
        arm: The arm.
        region: The drawer's region, e.g. `wooden_cabinet_1_middle_region`.
    """
    drawer = Drawer(arm, region)
    for _ in range(arm.attempts):
        yield from _pull(arm, drawer)
        arm.log.append(f"{region} is open by {drawer.opening:.3f} m")
        if drawer.opening > _DRAWER_OPEN:
            return True
    return False


def _pull(arm: Arm, drawer: Drawer) -> Motion:
    scene, out, error = arm.scene, drawer.out, arm.take_grasp_error()
    yaw = math.atan2(out[1], out[0]) - math.pi / 2
    frame = rot_z(yaw) @ rot_x(0.15 - math.pi / 2) @ GRIPPER_DOWN
    start = drawer.handle() + 0.12 * out
    start[2] = max(start[2], scene.tip[2])

    def before(distance: float) -> Pose:
        return drawer.handle() + error + distance * out, frame

    yield from arm.move("transit", lambda: (start, frame), OPEN, tol=0.03, rtol=0.3, steps=90)
    yield from arm.move("approach", lambda: before(0.10), OPEN, tol=0.012, rtol=0.08, steps=80)
    yield from arm.move(
        "approach", lambda: before(0.002), OPEN, tol=0.006, rtol=0.1, steps=60, vmax=0.4, stall=8
    )
    yield from arm.close()
    x, y, _ = drawer.handle() + (_DRAWER_TRAVEL - drawer.opening) * out

    def pulled() -> Pose:
        return np.array([x, y, scene.tip[2]]), frame

    yield from arm.move("work", pulled, CLOSE, rtol=ANY, steps=90, vmax=0.5, stall=12)
    yield from arm.release()
    away = scene.tip + 0.07 * out
    yield from arm.move("retreat", lambda: (away, frame), OPEN, tol=0.02, rtol=ANY, steps=30)


def put_in_drawer(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Opens a drawer and puts a bowl into it: `in <bowl> <cabinet>_<level>_region`."""
    _, _, region = predicate
    drawer = Drawer(arm, region)
    if not (drawer.opening > _DRAWER_OPEN or (yield from open_drawer(arm, region))):
        return False
    yield from arm.rise("retreat", arm.scene.tip[2] + 0.12, OPEN, tol=0.03, steps=40)
    # The rim away from the cabinet, leaning outwards: the hand must not touch the cabinet's top.
    out = drawer.out
    goal, side = drawer.resting_place, math.atan2(out[1], out[0])
    choose = partial(rim_grasp, goal=goal, side=side, tilt=0.5)
    return (yield from pick_and_place(arm, predicate, choose, goal, drop=0.02))


def turn_knob(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Grasps a stove's knob from above and twists it: `turnon <stove>`."""
    for _ in range(arm.attempts):
        yield from _twist(arm, f"{predicate[1]}_button")
        if arm.scene.holds(predicate):
            return True
        arm.log.append("the knob has not turned far enough")
    return False


def _twist(arm: Arm, knob: str) -> Motion:
    scene = arm.scene
    x, y, _ = scene.joint_anchor(knob) + arm.take_grasp_error()
    _, corners = scene.part_boxes(knob)
    turned = scene.joint(knob)
    low = np.array([x - 0.005, y, corners[..., 2].max() - 0.018])
    high = low + np.array([0.0, 0.0, 0.1])
    start = rot_z(turned) @ GRIPPER_DOWN
    end = rot_z(min(turned + _KNOB_TURN, _KNOB_MOST)) @ GRIPPER_DOWN
    yield from arm.move("transit", lambda: (high, start), OPEN, tol=0.012, rtol=0.08, steps=110)
    yield from arm.move(
        "approach", lambda: (low, start), OPEN, tol=0.005, rtol=0.08, steps=50, vmax=0.35, stall=8
    )
    yield from arm.close()
    yield from arm.move("work", lambda: (low, end), CLOSE, tol=0.02, rtol=0.08, steps=50)
    yield from arm.release()
    yield from arm.rise("retreat", high[2], OPEN, steps=30)


def push_to(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Pushes a plate from inside its rim with closed fingers: `on <plate> <region>`."""
    _, name, region = predicate
    for _ in range(arm.attempts):
        yield from _push(arm, name, arm.scene.site(region)[:2])
        if arm.scene.holds(predicate):
            return True
        arm.log.append(f"{name} has not arrived")
    return False


def _push(arm: Arm, name: str, goal: Array) -> Motion:
    scene = arm.scene
    z = scene.position(name)[2] + 0.009  # just above the flat middle, below the rim

    def heading() -> Array:
        way = goal - scene.position(name)[:2]
        return way / max(1e-6, float(np.linalg.norm(way)))

    first = heading()
    # The wide side of the closed fingers across the push.
    frame = rot_z(wrap(math.atan2(first[1], first[0]), math.pi)) @ GRIPPER_DOWN

    def inside(height: float) -> Pose:
        x, y = scene.position(name)[:2] + 0.02 * heading()
        return np.array([x, y, height]), frame

    yield from arm.rise("transit", z + 0.12, CLOSE, tol=0.03, steps=30)
    yield from arm.move("transit", lambda: inside(z + 0.10), CLOSE, tol=0.012, rtol=0.1, steps=90)
    yield from arm.move(
        "approach", lambda: inside(z), CLOSE, tol=0.005, rtol=ANY, steps=50, vmax=0.5, stall=8
    )
    for _ in range(round(120 / arm.config.speed)):
        center = scene.position(name)[:2]
        slip = scene.tip[:2] - center
        if np.linalg.norm(goal - center) < 0.012 or np.linalg.norm(slip) > 0.1:
            break
        ahead = heading()
        sideways = slip - (slip @ ahead) * ahead
        x, y = scene.tip[:2] + 0.03 * ahead - 1.2 * sideways
        arm.phase = "work"
        yield arm.servo(np.array([x, y, z + 0.001]), frame, CLOSE, vmax=0.5)
    yield from arm.rise("retreat", scene.tip[2] + 0.1, CLOSE, tol=0.03, steps=25)


def lay_on_rack(arm: Arm, predicate: Sequence[str]) -> Skill:
    """Takes a bottle by its neck, leans it and lays it along a rack: `on <bottle> <region>`."""
    _, name, region = predicate
    scene = arm.scene

    def goal() -> Array:
        return scene.site(region) + _RACK_OFFSET

    for _ in range(arm.attempts):
        grasp = yield from pick(arm, name, side_grasp)
        if grasp is None:
            continue
        yield from arm.rise("lift", scene.site(region)[2] + 0.22, CLOSE, tol=0.03, steps=40)
        leaning = replace(grasp, frame=lean(0.0, _RACK_LEAN) @ grasp.frame)
        yield from carry(arm, name, leaning, goal, height=scene.site(region)[2] + 0.2)
        yield from place(arm, name, leaning, goal, drop=0.0, vmax=0.3)
        yield from arm.hold("retreat", 8, OPEN)
        if scene.holds(predicate):
            return True
        arm.log.append(f"{name} does not lie on the rack")
    return False
