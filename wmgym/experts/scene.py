"""Privileged, read-only view of a LIBERO scene: poses, sites, boxes, clearances.

All collision geometry of LIBERO's objects and fixtures is made of boxes, so free space is decided
on the boxes themselves. Everything that depends on the model only is looked up once; a query reads
the current simulator state. Positions are metres in the world frame, z up; a view belongs to one
episode, since a hard reset of the environment builds a new model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmgym.experts.geometry import (
    Array,
    box_points,
    count_inside,
    distance_to_segment,
    gripper_cloud,
)
from wmgym.extras import require

Ids = NDArray[np.intp]

ROBOT_ROOT = "robot0_base"
GRIPPER_SITE = "gripper0_grip_site"
_MARGIN = 0.004
"""Distance to boxes at which the gripper counts as inside, metres."""

_OPEN_GRIPPER = gripper_cloud()
_GRIPPER_RADIUS = float(np.linalg.norm(_OPEN_GRIPPER, axis=1).max())


class Scene:
    """What an expert may know about the simulator, read fresh at every call.

    Objects and fixtures go by their BDDL names (`"plate_1"`), parts by their MuJoCo names.

    Args:
        env: A `libero.libero.envs.env_wrapper.ControlEnv`, after `reset`.
    """

    def __init__(self, env: Any) -> None:
        self._mujoco = require("mujoco", "libero")
        self._problem = env.env
        self._model = env.sim.model._model
        self._data = env.sim.data._data
        self._ids: dict[tuple[str, str], int] = {}
        self._body_boxes: dict[int, Ids] = {}
        self._site = self._id("SITE", GRIPPER_SITE)
        self._fingers = np.asarray(env.env.robots[0]._ref_gripper_joint_pos_indexes)

    # --- the robot --------------------------------------------------------------------------

    @property
    def tip(self) -> Array:
        """Point between the fingertips `(3,)`."""
        return self._data.site_xpos[self._site].copy()

    @property
    def tip_frame(self) -> Array:
        """Orientation of the gripper `(3, 3)`: x along the opening, z along the approach."""
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    @property
    def fingers(self) -> Array:
        """Finger joint positions `(2,)`, metres."""
        return self._data.qpos[self._fingers].copy()

    @cached_property
    def base(self) -> Array:
        """Foot of the arm `(3,)`; it never moves."""
        return self._data.xpos[self._id("BODY", "robot0_link0")].copy()

    # --- objects and fixtures -----------------------------------------------------------------

    @property
    def goal(self) -> list[list[str]]:
        """The BDDL goal, a conjunction of predicates such as `["on", "bowl_1", "plate_1"]`."""
        return self._problem.parsed_problem["goal_state"]

    @property
    def objects(self) -> Collection[str]:
        """Names of the movable objects."""
        return self._problem.objects_dict.keys()

    def holds(self, predicate: Sequence[str]) -> bool:
        """Whether LIBERO says that the predicate is true now."""
        return bool(self._problem._eval_predicate(predicate))

    def position(self, name: str) -> Array:
        """Origin of an object's or fixture's body `(3,)`."""
        return self._data.xpos[self._problem.obj_body_id[name]].copy()

    def target(self, name: str) -> Array:
        """Where a goal region or a supporting object is `(3,)`: object origin or site centre."""
        return self.position(name) if name in self.objects else self.site(name)

    def site(self, name: str) -> Array:
        """Centre of a MuJoCo site `(3,)`."""
        return self._data.site_xpos[self._id("SITE", name)].copy()

    def joint(self, name: str) -> float:
        """Position of a hinge (radians) or slide (metres) joint."""
        return float(self._data.qpos[self._model.jnt_qposadr[self._id("JOINT", name)]])

    def joint_axis(self, name: str) -> Array:
        """Axis of a joint in the world frame `(3,)`, of unit length."""
        return self._data.xaxis[self._id("JOINT", name)].copy()

    def joint_anchor(self, name: str) -> Array:
        """Anchor point of a joint `(3,)`."""
        return self._data.xanchor[self._id("JOINT", name)].copy()

    # --- boxes --------------------------------------------------------------------------------

    def points(self, name: str) -> Array:
        """Grid points of an object's collision boxes, parts included, `(p, 3)`."""
        return self._points(self._boxes_below(self._problem.obj_body_id[name]), 3).reshape(-1, 3)

    def bounds(self, name: str) -> tuple[Array, Array]:
        """Lowest and highest corner of an object's axis-aligned bounding box, each `(3,)`."""
        corners = self._points(self._boxes_below(self._problem.obj_body_id[name]), 2)
        return corners.min((0, 1)), corners.max((0, 1))

    def part_boxes(self, body: str) -> tuple[Array, Array]:
        """The boxes of one body, its children excluded: centres `(b, 3)`, corners `(b, 8, 3)`."""
        boxes = self._boxes[self._model.geom_bodyid[self._boxes] == self._id("BODY", body)]
        return self._data.geom_xpos[boxes].copy(), self._points(boxes, 2)

    def collisions(self, tip: Array, frame: Array, skip: str) -> int:
        """How deep an open gripper at this pose would be in the scene's boxes.

        Args:
            tip: Point between the fingertips `(3,)`.
            frame: Gripper orientation `(3, 3)`.
            skip: Object that does not count: the one to be grasped.

        Returns:
            Number of sampled gripper points inside a box; 0 is free.
        """
        boxes = self._obstacles(skip)
        centers, half = self._data.geom_xpos[boxes], self._model.geom_size[boxes]
        radius = np.linalg.norm(half, axis=1) + _GRIPPER_RADIUS + _MARGIN
        near = np.linalg.norm(centers - tip, axis=1) < radius
        rotations = self._data.geom_xmat[boxes[near]].reshape(-1, 3, 3)
        cloud = _OPEN_GRIPPER @ frame.T + tip
        return count_inside(cloud, centers[near], rotations, half[near], _MARGIN)

    def clearance(self, start: Array, end: Array, skip: str) -> float:
        """Height that clears everything near the horizontal segment from `start` to `end`.

        Args:
            start: Horizontal position `(2,)`.
            end: Horizontal position `(2,)`.
            skip: Object that does not count: the one in hand or to be grasped.

        Returns:
            Height in metres, or minus infinity if nothing is near.
        """
        corners = self._points(self._obstacles(skip), 2)
        distance = distance_to_segment(corners[..., :2], start, end)
        reached = (distance.min(axis=1, keepdims=True) < 0.11) & (distance < 0.2)
        return float(corners[..., 2].max(where=reached, initial=-np.inf))

    # --- the model, looked up once --------------------------------------------------------------

    @cached_property
    def _boxes(self) -> Ids:
        """Ids of all collision boxes that do not belong to the robot."""
        m = self._model
        collides = (m.geom_contype != 0) | (m.geom_conaffinity != 0)
        is_box = m.geom_type == int(self._mujoco.mjtGeom.mjGEOM_BOX)
        robot = m.body_rootid[m.geom_bodyid] == self._id("BODY", ROBOT_ROOT)
        return np.flatnonzero(collides & is_box & ~robot)

    def _boxes_below(self, body: int) -> Ids:
        """Ids of the collision boxes of a body and its descendants."""
        if body not in self._body_boxes:
            inside = np.zeros(self._model.nbody, bool)
            inside[body] = True
            for child in range(body + 1, self._model.nbody):  # parents come before their children
                inside[child] |= inside[self._model.body_parentid[child]]
            self._body_boxes[body] = self._boxes[inside[self._model.geom_bodyid[self._boxes]]]
        return self._body_boxes[body]

    def _obstacles(self, skip: str) -> Ids:
        """Ids of the collision boxes that are not the object `skip`."""
        return np.setdiff1d(
            self._boxes, self._boxes_below(self._problem.obj_body_id[skip]), assume_unique=True
        )

    def _points(self, boxes: Ids, n: int) -> Array:
        """Grid points of boxes `(b, n**3, 3)`."""
        rotations = self._data.geom_xmat[boxes].reshape(-1, 3, 3)
        return box_points(self._data.geom_xpos[boxes], rotations, self._model.geom_size[boxes], n)

    def _id(self, kind: str, name: str) -> int:
        """MuJoCo's id of a named thing; `kind` is one of SITE, BODY, JOINT."""
        if (kind, name) not in self._ids:
            found = self._mujoco.mj_name2id(
                self._model, getattr(self._mujoco.mjtObj, f"mjOBJ_{kind}"), name
            )
            if found < 0:
                raise ValueError(f"the scene has no {kind.lower()} named {name!r}")
            self._ids[kind, name] = found
        return self._ids[kind, name]
