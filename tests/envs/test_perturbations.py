"""Perturbed starts: what moves, how far, and that the scene is sound."""

from __future__ import annotations

import numpy as np
import pytest

from wmgym.envs.libero import LiberoEnv
from wmgym.envs.perturbations import PERTURBATIONS, Perturbation
from wmgym.envs.simulator import Simulator, initial_states

pytestmark = pytest.mark.libero


@pytest.fixture(scope="module", params=[("libero_object", 0), ("libero_spatial", 3)])
def scene(request):
    suite, task = request.param
    simulator = Simulator(suite, task, image_size=(32, 32))
    simulator.place_fixtures(0)
    yield simulator, initial_states(suite, task)[40]
    simulator.close()


def settled(simulator, state):
    simulator.begin(state)
    return simulator.object_positions(), simulator.state()[1:8]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_only_what_is_named_moves_and_no_further_than_it_says(name, scene):
    simulator, state = scene
    perturbation = PERTURBATIONS[name]
    before, arm = settled(simulator, state)
    carried = {name for pair in simulator.contacts() for name in pair}
    targets, goals = simulator.goal()
    after, turned = settled(simulator, perturbation(simulator, state, np.random.default_rng(3)))
    reach = dict.fromkeys(before, perturbation.objects)
    reach |= dict.fromkeys(targets, max(perturbation.objects, perturbation.target))
    reach |= dict.fromkeys(goals, max(perturbation.objects, perturbation.goal))
    for thing, position in before.items():
        offset = np.abs(after[thing] - position)[:2].max()
        allowed = max(reach.values()) if thing in carried else reach[thing]
        assert offset <= allowed + 0.01, thing
    for thing in targets if perturbation.target else ():
        assert np.abs(after[thing] - before[thing])[:2].max() > 1e-3
    assert np.abs(turned - arm).max() <= perturbation.joints + 0.02
    assert (np.abs(turned - arm).max() > 1e-3) == (perturbation.joints > 0)


def test_what_carries_a_target_moves_with_it_and_nothing_may_fall_off_the_table():
    simulator = Simulator("libero_spatial", 3, image_size=(32, 32))
    state = initial_states("libero_spatial", 3)[41]
    simulator.place_fixtures(0)
    before, _ = settled(simulator, state)
    moved = PERTURBATIONS["object_position_major"](simulator, state, np.random.default_rng(0))
    after, _ = settled(simulator, moved)
    with pytest.raises(RuntimeError, match="use smaller offsets"):
        Perturbation(objects=3.0)(simulator, state, np.random.default_rng(0))
    simulator.close()
    bowl, box = ("akita_black_bowl_1", "cookies_1")
    shift = after[bowl] - before[bowl]
    assert np.abs(shift[:2]).max() > 0.01
    np.testing.assert_allclose(after[box] - before[box], shift, atol=0.01)


def test_the_seed_decides(scene):
    simulator, state = scene
    jitter = PERTURBATIONS["jitter"]
    one, two, other = (jitter(simulator, state, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    standard = PERTURBATIONS["standard"]
    unmoved = standard(simulator, state, np.random.default_rng(0))
    np.testing.assert_array_equal(unmoved, state)


def test_an_environment_starts_from_perturbed_states():
    env = LiberoEnv(
        image_size=32,
        tasks=[0],
        init_state_transform=PERTURBATIONS["robot_state_major"],
    )
    options = {"task_id": 0, "init_state": 40}
    arms = []
    for seed in (0, 0, 1):
        env.reset(seed=seed, options=options)
        arms.append(env.simulator.state()[1:8])
    env.close()
    np.testing.assert_array_equal(arms[0], arms[1])
    assert np.abs(arms[0] - arms[2]).max() > 0.01
