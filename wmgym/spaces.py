"""The contract shared by `LIBERO-v0` and `WorldModel-LIBERO-v0`.

Observation: `Dict(image uint8 (H, W, 3), proprio float32 (8,))`, optionally `wrist_image`. The
image is the third-person camera turned by 180 degrees, as in the modified LIBERO RLDS data.
Proprioception is end-effector position (3, metres), axis-angle orientation (3, radians) and the two
gripper joint positions (2, metres).

Action: `Box(-1, 1, (7,))` in LIBERO's convention: delta position (3), delta axis-angle (3), gripper
(-1 opens, +1 closes); with `action_chunk=T`, `Box(-1, 1, (T, 7))`, and one step of the environment
advances `T` control steps of 1/20 s.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

ACTION_DIM = 7
PROPRIO_DIM = 8
CONTROL_HZ = 20
CAMERAS = ("agentview", "wrist")
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
STEP_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps after which an episode of a suite is truncated (the published protocol)."""


def observation_space(
    image_size: tuple[int, int], cameras: Sequence[str] = ("agentview",)
) -> spaces.Dict:
    """Observation space for images of `(H, W)` pixels and the given cameras.

    Raises:
        ValueError: Other cameras.
    """
    if not isinstance(cameras, (list, tuple)) or tuple(cameras) not in (CAMERAS[:1], CAMERAS):
        raise ValueError(f"cameras={cameras!r}: allowed are {CAMERAS[:1]} and {CAMERAS}")
    height, width = image_size
    image = spaces.Box(0, 255, (height, width, 3), np.uint8)
    entries: dict[str, spaces.Space] = {"image": image}
    if "wrist" in cameras:
        entries["wrist_image"] = spaces.Box(0, 255, (height, width, 3), np.uint8)
    entries["proprio"] = spaces.Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32)
    return spaces.Dict(entries)


def action_space(action_chunk: int | None = None) -> spaces.Box:
    """Action space of one control step `(7,)`, or of a chunk `(T, 7)`.

    Raises:
        ValueError: `action_chunk` is neither None nor an integer >= 1.
    """
    if action_chunk is None:
        return spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
    chunk = check_integer("action_chunk", action_chunk)
    return spaces.Box(-1.0, 1.0, (chunk, ACTION_DIM), np.float32)


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """The integer `value`.

    Raises:
        ValueError: It is no integer, or below `least`; the message has `name`.
    """
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer >= {least}")
    return int(value)


def check_tasks(tasks: Iterable[int]) -> tuple[int, ...]:
    """Task ids as a tuple.

    Raises:
        ValueError: Not a sequence of integers.
    """
    try:
        return tuple(operator.index(task) for task in tasks)
    except TypeError:
        raise ValueError(
            f"tasks={tasks!r}: expected a list of task ids, as [3], or None for all"
        ) from None


def check_actions(actions: NDArray, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Validates an action or a chunk of them, and clips it to [-1, 1].

    Values outside [-1, 1] are clipped, as LIBERO's controller does; the caller warns once.

    Returns:
        A float32 copy, clipped.

    Raises:
        ValueError: Wrong shape, or NaN or infinity.
    """
    array = np.array(actions, dtype=np.float32)
    if array.shape != shape:
        raise ValueError(f"action has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"action contains NaN or infinity, first at index {where}")
    return np.clip(array, -1.0, 1.0)


def axis_angle(quaternion_xyzw: NDArray) -> NDArray[np.float32]:
    """Axis-angle vectors `(..., 3)` in radians of unit quaternions `(..., 4)` in xyzw order.

    The angle lies in [0, 2 pi): the sign of the quaternion is kept, as in the modified LIBERO data.
    """
    q = np.asarray(quaternion_xyzw, np.float64)
    w = np.clip(q[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    angle = 2.0 * np.arccos(w)
    scale = np.where(sine < 1e-8, 0.0, angle / np.maximum(sine, 1e-8))
    return (q[..., :3] * scale).astype(np.float32)
