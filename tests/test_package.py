"""What `import wmgym` costs and does; optional packages; the contract's numbers."""

from __future__ import annotations

import importlib
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import wmgym
from wmgym.extras import MissingExtraError, require
from wmgym.spaces import action_space, axis_angle, check_actions, observation_space

HEAVY = {"torch", "torchvision", "libero", "robosuite", "mujoco", "av", "pyarrow", "PIL", "scipy"}


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout


def test_importing_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; began = time.process_time(); import wmgym; "
        "print(time.process_time() - began, *{name.split('.')[0] for name in sys.modules})"
    )
    outputs = [in_a_fresh_process(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in outputs) < 0.3
    assert not HEAVY & set(outputs[0][1:])


def test_both_environments_are_registered_and_exist():
    for name in ("WorldModel-LIBERO-v0", "LIBERO-v0"):
        spec = gym.spec(name)
        points = [spec.entry_point, spec.vector_entry_point]
        for point in (p for p in points if p is not None):
            assert isinstance(point, str)
            module, _, attribute = point.partition(":")
            assert hasattr(importlib.import_module(module), attribute)
    assert wmgym.__version__


# --- extras -------------------------------------------------------------------------------------


def test_an_installed_package_is_returned():
    assert require("json.decoder", "none") is importlib.import_module("json.decoder")


@pytest.mark.parametrize("module", ["no_such_package_here", "no_such_package_here.part"])
def test_a_missing_package_names_its_extra(module):
    with pytest.raises(MissingExtraError, match=r"pip install 'wmgym\[sb3\]'") as error:
        require(module, "sb3")
    assert module in str(error.value)
    assert "\n" not in str(error.value)


def test_what_an_installed_package_lacks_is_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed_here.py").write_text("import no_such_package_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here") as error:
        require("half_installed_here", "sb3")
    assert not isinstance(error.value, MissingExtraError)


# --- spaces -------------------------------------------------------------------------------------


def test_actions_are_seven_numbers_or_chunks_of_them():
    assert action_space().shape == (7,)
    assert action_space(5).shape == (5, 7)
    for space in (action_space(), action_space(5)):
        assert space.dtype == np.float32
        assert (space.low == -1).all()
        assert (space.high == 1).all()
    with pytest.raises(ValueError, match="action_chunk=0"):
        action_space(0)


def test_observations_are_pictures_and_eight_readings():
    space = observation_space((48, 64), ("agentview", "wrist"))
    assert {key: (s.shape, s.dtype) for key, s in space.items()} == {
        "image": ((48, 64, 3), np.uint8),
        "wrist_image": ((48, 64, 3), np.uint8),
        "proprio": ((8,), np.float32),
    }
    assert set(observation_space((8, 8)).keys()) == {"image", "proprio"}


@pytest.mark.parametrize("cameras", [(), ("wrist",), ("agentview", "side"), ("wrist", "agentview")])
def test_unknown_cameras_are_refused(cameras):
    with pytest.raises(ValueError, match="allowed are"):
        observation_space((8, 8), cameras)


def test_actions_are_clipped_copies_in_float32():
    given = np.array([[-3.0, 0.5, 1.0, 0, 0, 0, 2.0]])
    checked = check_actions(given, (1, 7))
    np.testing.assert_array_equal(checked, [[-1, 0.5, 1, 0, 0, 0, 1]])
    assert checked.dtype == np.float32
    checked[:] = 0
    assert given[0, 0] == -3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused_with_their_place(value):
    actions = np.zeros((3, 7))
    actions[2, 4] = value
    with pytest.raises(ValueError, match=r"NaN or infinity, first at index \[2, 4\]"):
        check_actions(actions, (3, 7))


def test_actions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(7,\), expected \(2, 7\)"):
        check_actions(np.zeros(7), (2, 7))


def test_axis_angles_are_those_of_scipy_up_to_the_sign_of_the_quaternion():
    rotations = Rotation.random(200, rng=0)
    quaternions = rotations.as_quat()
    vectors = axis_angle(quaternions)
    np.testing.assert_allclose(
        (Rotation.from_rotvec(vectors).inv() * rotations).magnitude(), 0, atol=1e-5
    )
    angles = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(np.cos(angles / 2), quaternions[:, 3], atol=1e-5)
    assert (axis_angle(np.array([[0, 0, 0, 1.0], [0, 0, 0, -1.0]])) == 0).all()
