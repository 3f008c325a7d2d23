"""RLDS to LeRobot and back: numbers stay the same bit for bit, pictures within a stated bound."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import numpy as np
import pytest
from coded_episodes import decoded_numbers

from wmgym import cli
from wmgym.assets import asset_path
from wmgym.data import (
    DatasetError,
    LeRobotDataset,
    RLDSDataset,
    convert,
    convert_dataset,
    open_dataset,
    subset,
)

BOUND = 6.0
"""Most that a frame may differ on average after H.264 and JPEG, levels of 255."""


def assert_same(left, right, *, bound=BOUND):
    """The episodes of two datasets agree: numbers exactly, pictures within the bound."""
    assert len(left.episodes) == len(right.episodes)
    wrist = left.has_wrist
    assert right.has_wrist == wrist
    for a, b in zip(left.episodes, right.episodes, strict=True):
        for name in ("length", "instruction", "suite", "task_id", "init_state_id", "seed"):
            assert getattr(a, name) == getattr(b, name)
        assert (a.success, a.held_out) == (b.success, b.held_out)
        x, y = (d.read(a.episode_id, wrist=wrist) for d in (left, right))
        assert x.actions.tobytes() == y.actions.tobytes()
        assert x.proprio.tobytes() == y.proprio.tobytes()
        for name in ("images", "wrist_images") if wrist else ("images",):
            p, q = getattr(x, name), getattr(y, name)
            np.testing.assert_array_equal(decoded_numbers(p), decoded_numbers(q))
            assert np.abs(p.astype(float) - q).mean((1, 2, 3)).max() < bound


@pytest.fixture(scope="module")
def from_rlds(published_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("lerobot") / "libero_object"
    return convert_dataset(published_root, out, progress=False)


def test_rlds_becomes_lerobot_and_rlds_again(published_root, from_rlds, tmp_path):
    original, middle = open_dataset(published_root), open_dataset(from_rlds)
    assert isinstance(middle, LeRobotDataset)
    assert_same(original, middle)
    assert middle.episodes == original.episodes
    back = convert_dataset(from_rlds, tmp_path / "libero_object_no_noops", progress=False)
    assert_same(original, RLDSDataset(back))
    assert RLDSDataset(back).episodes == original.episodes
    assert not list(from_rlds.parent.glob("*.staging"))


def test_lerobot_becomes_rlds_and_lerobot_again(joined_root, tmp_path):
    original = open_dataset(joined_root)
    middle = convert_dataset(joined_root, tmp_path / "middle", progress=False)
    assert_same(original, open_dataset(middle))
    back = convert_dataset(middle, tmp_path / "back", progress=False)
    assert_same(original, open_dataset(back))


def test_shipped_demonstrations_are_converted_within_the_bound(tmp_path):
    short = subset(asset_path("demos", "libero_spatial"), tmp_path / "short", [0, 30])
    original = open_dataset(short)
    rlds = RLDSDataset(convert_dataset(short, tmp_path / "rlds", progress=False))
    a, b = original.read(1), rlds.read(1)
    np.testing.assert_array_equal(a.actions, b.actions)
    assert np.abs(a.images.astype(float) - b.images).mean() < 2
    assert dataclasses.replace(rlds.episodes[1], extra={}) == dataclasses.replace(
        original.episodes[1], extra={}
    )
    back = open_dataset(convert_dataset(tmp_path / "rlds", tmp_path / "back", progress=False))
    assert np.abs(a.images.astype(float) - back.read(1).images).mean() < 3


def test_the_wrist_camera_may_be_left_out(published_root, tmp_path):
    assert not open_dataset(
        convert_dataset(published_root, tmp_path / "out", wrist=False, progress=False)
    ).has_wrist


def test_an_interrupted_conversion_goes_on(published_root, from_rlds, tmp_path, monkeypatch):
    stage, staged, limit = convert.stage_episode, [], 6

    def stage_some(staging, name, episode, **options):
        if len(staged) == limit:
            raise KeyboardInterrupt
        staged.append(name)
        return stage(staging, name, episode, **options)

    out = tmp_path / "libero_object"
    monkeypatch.setattr(convert, "stage_episode", stage_some)
    with pytest.raises(KeyboardInterrupt):
        convert_dataset(published_root, out, progress=False)
    assert not out.exists()
    limit = None
    convert_dataset(published_root, out, progress=False)
    assert len(set(staged)) == len(staged) == 10
    whole, parts = LeRobotDataset(from_rlds), LeRobotDataset(out)
    assert whole.fingerprint() == parts.fingerprint()


def test_the_staging_area_of_something_else_is_left_alone(published_root, joined_root, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(joined_root, tmp_path / "out.staging" / "episode-000000")
    with pytest.raises(FileExistsError, match=r"no source\.json, so it is of something else"):
        convert_dataset(published_root, out, progress=False)
    (tmp_path / "out.staging" / "source.json").write_text("{}")
    with pytest.raises(FileExistsError, match="staging area of something else"):
        convert_dataset(published_root, out, progress=False)
    with pytest.raises(FileExistsError, match="exists; remove it"):
        convert_dataset(published_root, tmp_path, progress=False)


@pytest.mark.parametrize("ending", ["staging", "part"])
def test_folders_of_others_are_not_removed(ending, published_root, from_rlds, tmp_path):
    data = published_root if ending == "staging" else from_rlds
    theirs = tmp_path / f"out.{ending}" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("not to be lost")
    with pytest.raises(FileExistsError, match=rf"out\.{ending} holds \['notes\.txt'\] and no"):
        convert_dataset(data, tmp_path / "out", progress=False)
    assert theirs.read_text() == "not to be lost"


def test_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="it holds nothing"):
        convert_dataset(tmp_path, tmp_path / "out")


def test_the_command_converts_both_ways(published_root, tmp_path, monkeypatch, capsys):
    def wmgym(*arguments):
        monkeypatch.setattr(sys, "argv", ["wmgym", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    lerobot, rlds = tmp_path / "lerobot", tmp_path / "libero_object_no_noops"
    printed = wmgym("convert", "--data", published_root.parent, "--out", lerobot)
    assert printed == f"wrote {lerobot}\n"
    options = ("--no-wrist", "--quality", 90)
    assert wmgym("convert", "--data", lerobot, "--out", rlds, *options) == f"wrote {rlds}\n"
    assert isinstance(open_dataset(lerobot), LeRobotDataset)
    assert not open_dataset(rlds).has_wrist
    with pytest.raises(SystemExit, match="exists; remove it"):
        wmgym("convert", "--data", published_root, "--out", rlds)
