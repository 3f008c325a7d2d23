"""Perturbed initial states: objects, goal or robot a little elsewhere than ever recorded.

A perturbation is an `init_state_transform` of `LiberoEnv`. It shifts things horizontally by
uniformly drawn offsets, together with whatever stands on them or carries them, and turns the joints
of the arm. Stored states hold objects in the air or inside the floor, so whether a shifted scene is
sound is seen when it has settled: everything must then rest where it rested, but for its offset.
Otherwise new offsets are drawn.

`PERTURBATIONS` holds the settings of VLA-RFT's robustness study (arXiv 2510.00406), object
position, goal position, robot state and all three, minor and major. The paper gives ranges without
units; here positions are in centimetres, and a robot state of 20 or 50 is read as 0.1 or 0.25 rad
on each joint. `jitter` moves everything slightly, to have more episodes than there are stored
states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmgym.envs.simulator import Simulator

_ARM = slice(1, 8)
_TOLERANCE = 0.01
_TRIES = 60


@dataclass(frozen=True)
class Perturbation:
    """How far things may be from their stored places.

    Attributes:
        objects: Largest offset of every object, along x and y each, metres.
        target: Largest offset of what the task moves.
        goal: Largest offset of where it moves it to.
        joints: Largest offset of every joint of the arm, radians.
    """

    objects: float = 0.0
    target: float = 0.0
    goal: float = 0.0
    joints: float = 0.0

    def __call__(
        self, simulator: Simulator, state: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Perturbs an initial state.

        Args:
            simulator: The scene, its fixtures placed; left in an arbitrary state.
            state: `(S,)` stored initial state.
            rng: Source of the offsets.

        Returns:
            `(S,)` state to start from.

        Raises:
            RuntimeError: No sound scene was found.
        """
        state = state.copy()
        state[_ARM] += rng.uniform(-self.joints, self.joints, 7)
        if not (self.objects or self.target or self.goal):
            return state
        simulator.begin(state)
        rest = simulator.object_positions()
        stacks = _stacks(simulator)
        targets, goals = simulator.goal()
        for _ in range(_TRIES):
            offsets: dict[str, NDArray[np.float64]] = {}
            for stack in stacks:
                reach = max(
                    self.objects,
                    self.target * any(name in stack for name in targets),
                    self.goal * any(name in stack for name in goals),
                )
                offset = np.append(rng.uniform(-reach, reach, 2), 0.0)
                offsets.update(dict.fromkeys(stack, offset))
            moved = state.copy()
            for name in simulator.objects:
                moved[simulator.joint_columns(name)][:3] += offsets[name]
            fixtures = [name for name in offsets if name not in simulator.objects]
            for name in fixtures:
                simulator.move_fixture(name, offsets[name])
            simulator.begin(moved)
            now = simulator.object_positions()
            if all(np.abs(now[n] - rest[n] - offsets[n]).max() < _TOLERANCE for n in rest):
                return moved
            for name in fixtures:
                simulator.move_fixture(name, -offsets[name])
        raise RuntimeError(
            f"{self} found no sound scene of {simulator.suite} task {simulator.task_id} in "
            f"{_TRIES} tries; use smaller offsets"
        )


def _stacks(simulator: Simulator) -> list[set[str]]:
    """Objects and fixtures by what touches what: each set must move as one."""
    stacks: list[set[str]] = [{name} for name in simulator.things]
    for pair in simulator.contacts():
        touched = [stack for stack in stacks if stack & pair]
        stacks = [stack for stack in stacks if not stack & pair] + [set().union(*touched)]
    return stacks


PERTURBATIONS = {
    "standard": Perturbation(),
    "jitter": Perturbation(objects=0.01, joints=0.05),
    "object_position_minor": Perturbation(target=0.025),
    "object_position_major": Perturbation(target=0.05),
    "goal_position_minor": Perturbation(goal=0.025),
    "goal_position_major": Perturbation(goal=0.05),
    "robot_state_minor": Perturbation(joints=0.1),
    "robot_state_major": Perturbation(joints=0.25),
    "combined_minor": Perturbation(target=0.025, goal=0.025, joints=0.1),
    "combined_major": Perturbation(target=0.05, goal=0.05, joints=0.25),
}
"""Settings by name."""
