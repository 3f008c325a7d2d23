"""TFDS reads what we write, and we read what TFDS writes, with equal values (extra `rlds`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from wmgym.assets import asset_path
from wmgym.data import LeRobotDataset, RLDSDataset, convert_dataset, subset

PROGRAM = Path(__file__).parent / "tfds_program.py"


def tfds(*arguments: object) -> None:
    """Runs TFDS's side; its complaint is the test's."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, PROGRAM, *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def read_by_tfds(folder: Path, out: Path) -> dict[str, np.ndarray]:
    tfds("read", folder, out)
    with np.load(out) as arrays:
        return dict(arrays)


def assert_read_alike(folder: Path, theirs: dict[str, np.ndarray]) -> RLDSDataset:
    """Both readers find the same in a version folder, pixels included."""
    ours = RLDSDataset(folder)
    numbers = {int(name.split("/")[0]) for name in theirs}
    assert numbers == {info.episode_id for info in ours.episodes}
    for number, info in enumerate(ours.episodes):
        episode = ours.read(number, wrist=ours.has_wrist)
        np.testing.assert_array_equal(episode.actions, theirs[f"{number}/action"])
        np.testing.assert_array_equal(episode.proprio, theirs[f"{number}/state"])
        assert theirs[f"{number}/language_instruction"][0].decode() == info.instruction
        assert theirs[f"{number}/file_path"].item().decode() == info.extra["file_path"]
        cameras = {"image": episode.images, "wrist_image": episode.wrist_images}
        for camera, images in cameras.items():
            if images is None:
                assert f"{number}/{camera}/" not in theirs
                continue
            np.testing.assert_array_equal(images, theirs[f"{number}/{camera}/INTEGER_ACCURATE"])
            faster = theirs[f"{number}/{camera}/"].astype(float)
            assert np.abs(images - faster).mean() < 2  # TensorFlow's default decoder is coarser
    return ours


def test_tfds_reads_what_we_write(joined_root, tmp_path):
    out = convert_dataset(joined_root, tmp_path / "libero_object_no_noops", progress=False)
    theirs = read_by_tfds(out / "1.0.0", tmp_path / "read.npz")
    ours = assert_read_alike(out / "1.0.0", theirs)
    for number, info in enumerate(ours.episodes):
        last = np.arange(info.length) == info.length - 1
        np.testing.assert_array_equal(theirs[f"{number}/is_first"], np.arange(info.length) == 0)
        np.testing.assert_array_equal(theirs[f"{number}/is_last"], last)
        np.testing.assert_array_equal(theirs[f"{number}/reward"], last * (info.success is True))
        np.testing.assert_array_equal(theirs[f"{number}/discount"], np.ones(info.length))
        assert f"{number}/joint_state" not in theirs


def test_we_read_what_tfds_writes(tmp_path):
    tfds("write", tmp_path)
    folder = tmp_path / "libero_goal" / "1.0.0"
    with np.load(tmp_path / "read.npz") as theirs:
        ours = assert_read_alike(folder, dict(theirs))
    with np.load(tmp_path / "given.npz") as given:
        for episode_id, info in enumerate(ours.episodes):
            number = info.extra["file_path"]
            episode = ours.read(episode_id, wrist=True)
            np.testing.assert_array_equal(episode.actions, given[f"{number}/action"])
            np.testing.assert_array_equal(episode.proprio, given[f"{number}/state"])
            assert np.abs(episode.images - given[f"{number}/image"].astype(float)).mean() < 20
            assert (info.suite, info.task_id, info.success) == ("libero_goal", 7, True)


def test_tfds_reads_the_shipped_demonstrations(tmp_path):
    short = subset(asset_path("demos", "libero_object"), tmp_path / "short", [3, 70])
    out = convert_dataset(short, tmp_path / "libero_object", progress=False)
    theirs = read_by_tfds(out / "1.0.0", tmp_path / "read.npz")
    assert_read_alike(out / "1.0.0", theirs)
    states = LeRobotDataset(short).read(1).sim_states
    np.testing.assert_array_equal(theirs["1/joint_state"], states[:, 1:8].astype(np.float32))
