"""The arm as the skills see it: closed-loop motions that re-read the simulator at every step.

A motion is a generator of actions `(7,)`. It steers towards a target that is a function of the
current state, so whatever the caller executes instead of the yielded action (noise, for instance)
is corrected by the next one. Actions are proportional in LIBERO's own units: position error over
5 cm times 3, rotation vector over 0.5 rad times 2, each scaled down to a speed limit, gripper
-1 (open) or +1 (close).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wmgym.experts.geometry import Array, axis_angle
from wmgym.experts.scene import Scene

Phase = Literal[
    "transit", "approach", "grasp", "lift", "carry", "place", "release", "retreat", "work"
]
"""What the arm is doing; "work" is pulling, turning or pushing."""

Action = NDArray[np.float32]
Pose = tuple[Array, Array]
Target = Callable[[], Pose]
Motion = Generator[Action, None, None]
Skill = Generator[Action, None, bool]
"""Yields actions; returns whether the skill reached its end."""

OPEN, CLOSE = -1.0, 1.0
ANY = math.inf
"""Rotation tolerance of a motion whose orientation does not matter at its end."""

_POSITION_GAIN = 3.0 / 0.05
_ROTATION_GAIN = 2.0 / 0.5
_ROTATION_LIMIT = 0.5
_STALL_PROGRESS = 0.0012
_CLOSED_STILL = 2e-4

# The Panda, its gripper pointing down: the elbow locks when shoulder and wrist are 0.70 m apart.
_SHOULDER_HEIGHT, _WRIST_RADIUS, _WRIST_ABOVE_TIP, _LONGEST_REACH = 0.333, 0.088, 0.207, 0.67


@dataclass(frozen=True)
class ExpertConfig:
    """How an expert goes about its task.

    Attributes:
        speed: Factor on all speed limits, in [0.2, 1].
        grasp_offset: Horizontal error (x, y) of the first grasp, metres. A few centimetres make the
            gripper miss; the expert notices and tries again.
        give_up: One attempt per skill, and the episode ends with the first that fails.
    """

    speed: float = 1.0
    grasp_offset: tuple[float, float] = (0.0, 0.0)
    give_up: bool = False

    def __post_init__(self) -> None:
        if not 0.2 <= self.speed <= 1.0:
            raise ValueError(f"speed={self.speed}: allowed is [0.2, 1]")
        if len(self.grasp_offset) != 2 or not np.all(np.isfinite(self.grasp_offset)):
            raise ValueError(
                f"grasp_offset={self.grasp_offset}: allowed are two finite numbers (m)"
            )


class Arm:
    """Motions of the gripper, and the memory of one episode.

    Args:
        scene: The scene to read.
        rng: Source of all randomness.
        config: How to go about the task.

    Attributes:
        phase: What the motion that yielded the latest action was doing.
        log: What happened, one line each, for people.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, config: ExpertConfig) -> None:
        self.scene, self.rng, self.config = scene, rng, config
        self.phase: Phase = "transit"
        self.log: list[str] = []
        self._grasp_error = np.array([*config.grasp_offset, 0.0])

    @property
    def attempts(self) -> int:
        """How often a skill may try."""
        return 1 if self.config.give_up else 4

    def vary(self, low: float, high: float) -> float:
        """A uniform draw: transit heights, grasp sides and placements are never quite the same."""
        return float(self.rng.uniform(low, high))

    def take_grasp_error(self) -> Array:
        """The deliberate error `(3,)` of the grasp at hand: the configured one once, then zero."""
        error, self._grasp_error = self._grasp_error, np.zeros(3)
        return error

    # --- reach --------------------------------------------------------------------------------

    def stretch(self, tip: Array) -> float:
        """Distance from shoulder to wrist with the gripper pointing down at `tip`, metres."""
        dx, dy, dz = tip - self.scene.base
        return math.hypot(
            math.hypot(dx, dy) - _WRIST_RADIUS, dz + _WRIST_ABOVE_TIP - _SHOULDER_HEIGHT
        )

    def ceiling(self, tip: Array) -> float:
        """Greatest height of the tip that the arm reaches at the horizontal position of `tip`."""
        dx, dy, _ = tip - self.scene.base
        radius = math.hypot(dx, dy) - _WRIST_RADIUS
        rise = math.sqrt(max(0.0, _LONGEST_REACH**2 - radius**2))
        return float(self.scene.base[2] + _SHOULDER_HEIGHT - _WRIST_ABOVE_TIP + rise)

    def drawn_in(self, tip: Array) -> Array:
        """Moves `tip` towards the base, at its height, until the arm can reach it."""
        way = tip - self.scene.base
        height = way[2] + _WRIST_ABOVE_TIP - _SHOULDER_HEIGHT
        longest = _WRIST_RADIUS + math.sqrt(max(0.0, _LONGEST_REACH**2 - height**2))
        shrink = min(1.0, longest / max(1e-9, math.hypot(way[0], way[1])))
        return tip - (1.0 - shrink) * np.array([way[0], way[1], 0.0])

    # --- motions ------------------------------------------------------------------------------

    def servo(self, tip: Array, frame: Array, grip: float, vmax: float = 1.0) -> Action:
        """The action that takes the gripper towards a pose.

        Args:
            tip: Wanted point between the fingertips `(3,)`.
            frame: Wanted orientation `(3, 3)`.
            grip: `OPEN` or `CLOSE`.
            vmax: Speed limit, 1 is the controller's.

        Returns:
            Action `(7,)`, float32 in [-1, 1].
        """
        turn = axis_angle(frame @ self.scene.tip_frame.T)
        return self._action(tip - self.scene.tip, turn, grip, vmax)

    def move(
        self,
        phase: Phase,
        target: Target,
        grip: float,
        *,
        tol: float = 0.008,
        rtol: float = 0.06,
        steps: int = 120,
        vmax: float = 1.0,
        gain: float = 1.0,
        stall: int | None = None,
    ) -> Motion:
        """Goes to a moving target: until there, out of steps, or without progress.

        Args:
            phase: Name of the motion.
            target: Gives the wanted tip `(3,)` and orientation `(3, 3)` now.
            grip: `OPEN` or `CLOSE`.
            tol: Distance that counts as there, metres.
            rtol: Angle that counts as there, radians.
            steps: Limit at full speed; a slower expert gets proportionally more.
            vmax: Speed limit, 1 is the controller's.
            gain: Factor on the position gain: below 1 it brakes before it arrives.
            stall: Steps without progress (contact) after which the motion ends.
        """
        closest, stuck = math.inf, 0
        for _ in range(round(steps / self.config.speed)):
            tip, frame = target()
            error, turn = tip - self.scene.tip, axis_angle(frame @ self.scene.tip_frame.T)
            distance = math.sqrt(error @ error)
            if distance < tol and math.sqrt(turn @ turn) < rtol:
                return
            if distance < closest - _STALL_PROGRESS:
                closest, stuck = distance, 0
            else:
                stuck += 1
            if stall is not None and stuck >= stall:
                return
            self.phase = phase
            yield self._action(gain * error, turn, grip, vmax)

    def rise(
        self, phase: Phase, height: float, grip: float, *, tol: float = 0.02, steps: int = 60
    ) -> Motion:
        """Moves up to a height, and inwards where the arm would not reach.

        Args:
            phase: Name of the motion.
            height: Wanted height of the tip, metres.
            grip: `OPEN` or `CLOSE`.
            tol: As for `move`.
            steps: As for `move`.
        """
        x, y, _ = self.scene.tip
        top, frame = self.drawn_in(np.array([x, y, height])), self.scene.tip_frame
        yield from self.move(phase, lambda: (top, frame), grip, tol=tol, rtol=ANY, steps=steps)

    def hold(self, phase: Phase, steps: int, grip: float) -> Motion:
        """Stays where it is."""
        tip, frame = self.scene.tip, self.scene.tip_frame
        for _ in range(steps):
            self.phase = phase
            yield self.servo(tip, frame, grip)

    def close(self, steps: int = 12) -> Motion:
        """Closes the fingers until they stand still."""
        tip, frame = self.scene.tip, self.scene.tip_frame
        before = self.scene.fingers
        for step in range(steps):
            self.phase = "grasp"
            yield self.servo(tip, frame, CLOSE)
            now = self.scene.fingers
            if step > 5 and np.abs(now - before).max() < _CLOSED_STILL:
                return
            before = now

    def release(self) -> Motion:
        """Opens the fingers."""
        yield from self.hold("release", 8, OPEN)

    def _action(self, error: Array, turn: Array, grip: float, vmax: float) -> Action:
        linear, angular = _POSITION_GAIN * error, _ROTATION_GAIN * turn
        limit, angular_limit = vmax * self.config.speed, _ROTATION_LIMIT * self.config.speed
        # Height apart from the rest: a long way down must not drown the horizontal correction.
        linear[:2] *= min(1.0, limit / max(float(np.abs(linear[:2]).max()), 1e-9))
        linear[2] = min(max(linear[2], -limit), limit)
        angular *= min(1.0, angular_limit / max(float(np.abs(angular).max()), 1e-9))
        return np.array([*linear, *angular, grip], np.float32)
