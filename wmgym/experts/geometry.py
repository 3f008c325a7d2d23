"""Rotations and boxes: the geometry that the scripted experts need, in plain numpy.

Points are `(..., 3)` in metres, rotations `(3, 3)` matrices whose columns are the axes of the
rotated frame, angles are radians. `GRIPPER_DOWN` is the gripper's site frame when the hand points
at the table: fingers open along its x axis, the hand approaches along its z axis.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OPENING = 0.04
"""Distance of each open finger from the middle, metres."""

GRIPPER_DOWN: Array = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


def rot_x(angle: float) -> Array:
    """Rotation by `angle` about the x axis."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def rot_y(angle: float) -> Array:
    """Rotation by `angle` about the y axis."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def rot_z(angle: float) -> Array:
    """Rotation by `angle` about the z axis."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def lean(direction: float, angle: float) -> Array:
    """Rotation that tips the z axis by `angle` towards the horizontal direction `direction`.

    Applied to a gripper that points down, it moves the hand towards `direction` and keeps the
    fingertips in place.
    """
    return rot_z(direction) @ rot_y(angle) @ rot_z(-direction)


def axis_angle(rotation: Array) -> Array:
    """Rotation vector `(3,)` of a rotation matrix: axis times angle, the angle in [0, pi]."""
    r = rotation
    vector = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    sine = math.sqrt(vector @ vector)  # twice the sine of the angle
    cosine = r[0, 0] + r[1, 1] + r[2, 2] - 1.0  # twice its cosine
    if sine > 1e-6:
        return vector * (math.atan2(sine, cosine) / sine)
    if cosine > 0.0:
        return vector / 2.0
    # Half a turn: the antisymmetric part vanishes, the axis is a column of (R + 1) / 2.
    symmetric = (r + np.eye(3)) / 2.0
    column = symmetric[:, int(np.argmax(np.diag(symmetric)))]
    return column * (math.pi / math.sqrt(column @ column))


def wrap(angle: float, period: float = 2.0 * math.pi) -> float:
    """The angle modulo `period`, in [-period / 2, period / 2)."""
    return (angle + period / 2.0) % period - period / 2.0


def unit_grid(n: int) -> Array:
    """Points of the cube [-1, 1]^3 on a regular grid, `(n**3, 3)`; `n=2` gives its corners."""
    line = np.linspace(-1.0, 1.0, n)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)


def box_points(centers: Array, rotations: Array, half_sizes: Array, n: int = 3) -> Array:
    """Grid points of oriented boxes, in the world frame.

    Args:
        centers: Box centres `(b, 3)`.
        rotations: Box frames `(b, 3, 3)`.
        half_sizes: Half edge lengths `(b, 3)`.
        n: Points along each edge; 2 gives the corners.

    Returns:
        Points `(b, n**3, 3)`.
    """
    local = unit_grid(n)[None] * half_sizes[:, None]
    return local @ rotations.transpose(0, 2, 1) + centers[:, None]


def count_inside(
    points: Array, centers: Array, rotations: Array, half_sizes: Array, margin: float = 0.0
) -> int:
    """Number of (point, box) pairs with the point inside the box grown by `margin`.

    Args:
        points: `(p, 3)`.
        centers: `(b, 3)`.
        rotations: `(b, 3, 3)`.
        half_sizes: `(b, 3)`.
        margin: Metres added to each half edge.
    """
    local = (points[None] - centers[:, None]) @ rotations
    return int(np.all(np.abs(local) < half_sizes[:, None] + margin, axis=-1).sum())


def distance_to_segment(points: Array, start: Array, end: Array) -> Array:
    """Distance of points `(..., d)` to the segment from `start` to `end`, both `(d,)`."""
    along = end - start
    squared = max(1e-12, float(along @ along))
    t = np.clip((points - start) @ along / squared, 0.0, 1.0)
    return np.linalg.norm(points - (start + t[..., None] * along), axis=-1)


def gripper_cloud() -> Array:
    """Points of the Panda hand and its open fingers in the gripper's site frame, `(p, 3)`."""
    hand = np.meshgrid(
        np.linspace(-0.105, 0.105, 9), (-0.033, 0.0, 0.033), (-0.05, -0.08, -0.11), indexing="ij"
    )
    across = [side * (_OPENING + d) for side in (-1, 1) for d in (0.004, 0.014)]
    fingers = np.meshgrid(across, (-0.011, 0.0, 0.011), (-0.045, -0.02, 0.0, 0.010), indexing="ij")
    return np.concatenate([np.stack(g, axis=-1).reshape(-1, 3) for g in (hand, fingers)])
