"""Scripted experts: geometry, motions and planning without the simulator; solved tasks with it."""

from __future__ import annotations

import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from wmgym.experts import Expert, ExpertConfig, UnsupportedTaskError, plan
from wmgym.experts import geometry as geo
from wmgym.experts.arm import CLOSE, OPEN, Arm

# --- geometry ---------------------------------------------------------------------------------


def rodrigues(vector: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, 1.0, 3.0, math.pi - 1e-4])
def test_axis_angle_inverts_rodrigues(angle):
    rng = np.random.default_rng(0)
    for _ in range(20):
        axis = rng.normal(size=3)
        vector = angle * axis / np.linalg.norm(axis)
        np.testing.assert_allclose(geo.axis_angle(rodrigues(vector)), vector, atol=1e-7)


@pytest.mark.parametrize(
    "axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0, -0.8), (0.48, 0.6, 0.64)]
)
def test_axis_angle_of_half_a_turn(axis):
    vector = geo.axis_angle(rodrigues(math.pi * np.array(axis)))
    assert np.linalg.norm(vector) == pytest.approx(math.pi)
    np.testing.assert_allclose(rodrigues(vector), rodrigues(math.pi * np.array(axis)), atol=1e-7)


@pytest.mark.parametrize(("rotation", "axis"), [(geo.rot_x, 0), (geo.rot_y, 1), (geo.rot_z, 2)])
def test_elementary_rotations_are_rotations_about_their_axis(rotation, axis):
    np.testing.assert_allclose(geo.axis_angle(rotation(0.7)), 0.7 * np.eye(3)[axis], atol=1e-12)


@pytest.mark.parametrize("direction", [0.0, 1.0, -2.5])
def test_lean_moves_the_hand_towards_the_direction(direction):
    hand = -(geo.lean(direction, 0.5) @ geo.GRIPPER_DOWN)[:, 2]
    expected = [
        math.sin(0.5) * math.cos(direction),
        math.sin(0.5) * math.sin(direction),
        math.cos(0.5),
    ]
    np.testing.assert_allclose(hand, expected, atol=1e-12)


@pytest.mark.parametrize("period", [2 * math.pi, math.pi])
def test_wrap_is_the_same_angle_within_half_a_period(period):
    for angle in np.linspace(-20, 20, 101):
        wrapped = geo.wrap(angle, period)
        assert -period / 2 <= wrapped < period / 2
        turns = (angle - wrapped) / period
        assert turns == pytest.approx(round(turns), abs=1e-9)


def test_box_points_span_the_box_and_lie_inside_it():
    rng = np.random.default_rng(1)
    centers, half = rng.normal(size=(4, 3)), rng.uniform(0.1, 1, size=(4, 3))
    frames = np.stack([rodrigues(rng.normal(size=3)) for _ in range(4)])
    points = geo.box_points(centers, frames, half, n=3)
    assert points.shape == (4, 27, 3)
    local = np.einsum("bpi,bij->bpj", points - centers[:, None], frames)
    np.testing.assert_allclose(np.abs(local).max(1), half)
    for box in range(4):
        args = centers[box : box + 1], frames[box : box + 1], half[box : box + 1]
        assert geo.count_inside(points[box], *args, margin=1e-6) == 27
        assert geo.count_inside(points[box], *args, margin=-1e-6) == 1  # only the centre


def test_distance_to_segment_knows_its_ends():
    start, end = np.zeros(2), np.array([2.0, 0.0])
    points = np.array([[1.0, 0.5], [-3.0, 4.0], [5.0, 4.0]])
    np.testing.assert_allclose(geo.distance_to_segment(points, start, end), [0.5, 5.0, 5.0])
    np.testing.assert_allclose(geo.distance_to_segment(points[1:], start, start), [5.0, 41**0.5])


def test_gripper_cloud_leaves_room_between_the_fingers():
    cloud = geo.gripper_cloud()
    fingers = cloud[cloud[:, 2] > -0.049]
    assert np.abs(fingers[:, 0]).min() > 0.04
    np.testing.assert_allclose(cloud.mean(0)[:2], 0, atol=1e-12)  # symmetric


# --- motions, on an arm that does what it is told -----------------------------------------------


class IdealArm:
    """Moves 1.5 cm and 0.1 rad a step at full action."""

    def __init__(self):
        self.tip, self.tip_frame = np.array([0.0, 0.0, 1.0]), geo.GRIPPER_DOWN.copy()
        self.base, self.fingers = np.array([-0.5, 0.0, 0.9]), np.array([0.04, -0.04])

    def step(self, action):
        self.tip = self.tip + 0.015 * action[:3]
        self.tip_frame = rodrigues(0.1 * np.asarray(action[3:6], float)) @ self.tip_frame


def ideal(**config):
    body = IdealArm()
    return body, Arm(body, np.random.default_rng(0), ExpertConfig(**config))


@pytest.mark.parametrize("speed", [0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_move_reaches_a_moving_target_whatever_is_executed(speed, noise):
    body, arm = ideal(speed=speed)
    rng = np.random.default_rng(2)
    goal, frame = np.array([0.2, -0.1, 1.1]), geo.lean(1.0, 0.4) @ geo.GRIPPER_DOWN
    for action in arm.move("carry", lambda: (goal, frame), CLOSE):
        assert arm.phase == "carry"
        assert action.dtype == np.float32
        assert action[6] == CLOSE
        assert np.abs(action[:3]).max() <= speed + 1e-6
        assert np.abs(action[3:6]).max() <= 0.5 * speed + 1e-6
        body.step(action + noise * rng.normal(size=7) * [1, 1, 1, 0.3, 0.3, 0.3, 0])
        goal[0] += 0.0005
    assert np.linalg.norm(goal - body.tip) < 0.01
    assert np.linalg.norm(geo.axis_angle(frame @ body.tip_frame.T)) < 0.06


def test_move_ends_without_progress():
    body, arm = ideal()
    target = body.tip + np.array([0.0, 0.0, -0.3]), body.tip_frame
    assert len(list(arm.move("place", lambda: target, CLOSE, stall=8))) == 8  # nothing is executed
    assert len(list(arm.move("place", lambda: target, CLOSE, steps=30))) == 30


def test_close_waits_until_the_fingers_stand_still():
    body, arm = ideal()
    steps = 0
    for steps, action in enumerate(arm.close(steps=50), start=1):
        assert action[6] == CLOSE
        body.fingers = body.fingers * 0.8 if steps < 15 else body.fingers
    assert steps == 15


def test_the_arm_stays_within_its_reach():
    _, arm = ideal()
    near, far = np.array([-0.1, 0.1, 1.0]), np.array([0.1, -0.2, 1.5])
    assert arm.ceiling(near) > near[2]
    assert arm.ceiling(far) < far[2]
    under = np.array([far[0], far[1], arm.ceiling(far)])
    assert arm.stretch(under) == pytest.approx(0.67)
    np.testing.assert_array_equal(arm.drawn_in(near), near)
    inner = arm.drawn_in(far)
    assert inner[2] == far[2]
    assert arm.stretch(inner) == pytest.approx(0.67)
    ways = (inner - arm.scene.base)[:2], (far - arm.scene.base)[:2]
    assert math.atan2(*ways[0]) == pytest.approx(math.atan2(*ways[1]))


def test_grasp_error_is_made_once():
    _, arm = ideal(grasp_offset=(0.03, -0.02))
    np.testing.assert_allclose(arm.take_grasp_error(), [0.03, -0.02, 0.0])
    np.testing.assert_allclose(arm.take_grasp_error(), 0.0)


@pytest.mark.parametrize(
    "config",
    [{"speed": 0.0}, {"speed": 1.5}, {"speed": math.nan}, {"grasp_offset": (math.nan, 0.0)}],
)
def test_config_refuses_nonsense(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        ExpertConfig(**config)


# --- planning -----------------------------------------------------------------------------------


def test_plan_opens_and_turns_on_before_it_carries():
    goal = [["On", "akita_black_bowl_1", "plate_1"], ["Open", "wooden_cabinet_1_top_region"]]
    steps = plan([*goal, ["Turnon", "flat_stove_1"]], {"akita_black_bowl_1", "plate_1"})
    assert [step.predicate[0] for step in steps] == ["open", "turnon", "on"]


@pytest.mark.parametrize(
    "predicate",
    [
        ["in", "black_book_1", "desk_caddy_1_back_contain_region"],
        ["on", "moka_pot_1", "flat_stove_1_cook_region"],
        ["close", "white_cabinet_1_bottom_region"],
        ["open", "microwave_1"],
        ["in", "white_yellow_mug_1", "microwave_1_heating_region"],
    ],
)
def test_uncovered_goals_are_refused_by_name(predicate):
    with pytest.raises(UnsupportedTaskError, match=" ".join(predicate)):
        plan([predicate], {predicate[1]})


# --- in LIBERO ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soup():
    yield from simulator("libero_object", 0)


@pytest.fixture(scope="module")
def bowl():
    yield from simulator("libero_spatial", 0)


def simulator(suite, task_id):
    pytest.importorskip("libero", reason="needs the extra `libero`")
    from wmgym.envs.simulator import Simulator, initial_states

    simulator = Simulator(suite, task_id)
    states = initial_states(suite, task_id)
    yield SimpleNamespace(sim=simulator, reset=lambda k: simulator.reset(states[k], seed=k))
    simulator.close()


def run(task, *, state=0, seed=0, noise=0.0, steps=400, **config):
    """Solves a task from a stored state: the expert and the (action, phase) of every step."""
    task.reset(state)
    solver = Expert(task.sim.control_env, np.random.default_rng(seed), ExpertConfig(**config))
    rng, trace, drift = np.random.default_rng(seed), [], np.zeros(6)
    for action in solver:
        assert action.shape == (7,)
        assert np.abs(action).max() <= 1
        trace.append((action, solver.phase))
        executed = action.copy()
        if noise:
            drift = 0.85 * drift + noise * rng.normal(size=6) * [1, 1, 1, 0.3, 0.3, 0.3]
            executed[:6] = np.clip(executed[:6] + drift, -1, 1)
        task.sim.step(executed)
        if len(trace) == steps:
            break
    return solver, trace


@pytest.mark.libero
@pytest.mark.parametrize(("task", "noise"), [("soup", 0.0), ("bowl", 0.1)])
def test_expert_solves_the_task(task, noise, request):
    task = request.getfixturevalue(task)
    _, trace = run(task, noise=noise)
    assert task.sim.success
    assert 80 < len(trace) < 400
    phases = list(dict.fromkeys(phase for _, phase in trace))
    assert " ".join(phases) == "transit approach grasp lift carry place release retreat"
    closed = {phase for action, phase in trace if action[6] == CLOSE}
    assert closed == {"grasp", "lift", "carry", "place"}
    assert all(action[6] in (OPEN, CLOSE) for action, _ in trace)


@pytest.mark.libero
def test_expert_recovers_from_a_missed_grasp(soup):
    solver, trace = run(soup, grasp_offset=(0.0, 0.08))
    assert any("missed" in line for line in solver.log)
    assert soup.sim.success
    assert sum(phase == "grasp" for _, phase in trace) > 12  # closed the fingers twice


@pytest.mark.libero
def test_expert_that_gives_up_fails(soup):
    solver, trace = run(soup, grasp_offset=(0.0, 0.08), give_up=True)
    assert not soup.sim.success
    assert "carry" not in {phase for _, phase in trace}
    assert solver.log[-1].startswith("gave up")


@pytest.mark.libero
def test_expert_is_a_function_of_state_and_generator(bowl):
    bowl.reset(0)

    def beginning(seed):
        solver = Expert(bowl.sim.control_env, np.random.default_rng(seed))
        return np.stack(list(islice(solver, 5)))  # of a scene that stands still

    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(beginning(3), beginning(3))
    assert not np.array_equal(beginning(3), beginning(4))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.libero
def test_expert_refuses_a_task_before_the_first_action(soup, monkeypatch):
    goal = [["in", "basket_1", "floor"]]
    monkeypatch.setitem(soup.sim.control_env.env.parsed_problem, "goal_state", goal)
    with pytest.raises(UnsupportedTaskError, match="in basket_1 floor"):
        Expert(soup.sim.control_env, np.random.default_rng(0))
