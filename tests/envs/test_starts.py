"""Starts: who is eligible, how they are drawn, what is read; what is loaded by name."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import pytest
from tiny import model
from toy import SIZE, ToyDataset

from wmgym.cache import ByteCache
from wmgym.checkpoints import WEIGHTS, CheckpointError
from wmgym.data.episodes import DatasetError
from wmgym.data.frame_cache import resize
from wmgym.data.lerobot_format import INFO_PATH
from wmgym.envs.resources import resolve_dataset, resolve_world
from wmgym.envs.starts import StartStates
from wmgym.worlds.checkpoints import save_world


def make(dataset=None, **changes):
    arguments = {
        "suite": "libero_object",
        "tasks": None,
        "split": "train",
        "starts": "frames",
        "horizon": 8,
        "chunk": 4,
        "context": 3,
        "image_size": SIZE,
        "cache": ByteCache(2**24),
    }
    return StartStates(dataset or ToyDataset(), **(arguments | changes))


def test_frames_are_drawn_uniformly_and_leave_the_horizon():
    dataset = ToyDataset((10, 14))
    starts = make(dataset)
    rng = np.random.default_rng(0)
    drawn = [starts.draw(rng) for _ in range(4000)]
    allowed = [(0, 0), (0, 1)] + [(1, f) for f in range(6)]
    assert sorted(set(drawn)) == allowed
    counts = np.array([drawn.count(key) for key in allowed])
    assert (abs(counts - 500) < 100).all()
    assert all(starts.load(*key).steps == 8 for key in allowed)


def test_episode_starts_are_first_frames():
    rng = np.random.default_rng(0)
    starts = make(starts="episodes")
    assert {starts.draw(rng) for _ in range(100)} == {(i, 0) for i in range(4)}


def test_function_chooses_and_is_checked():
    seen = []

    def choose(rng, episodes):
        seen.append([e.episode_id for e in episodes])
        return 2, 5

    starts = make(starts=choose, tasks=[0])
    assert starts.draw(np.random.default_rng(0)) == (2, 5)
    assert seen == [[0, 2]]
    for given, message in (
        ((2, 99), "frame_index=99"),
        ((3, 2.5), r"returned \(3, 2.5\), expected the two integers"),
        (7, "returned 7, expected the two integers"),
        ((1, 2, 3), r"returned \(1, 2, 3\), expected the two integers"),
    ):
        starts = make(starts=lambda rng, episodes, given=given: given)
        with pytest.raises(ValueError, match=message):
            starts.draw(np.random.default_rng(0))


def test_split_task_success_and_suite_filter():
    dataset = ToyDataset(held_out=(1, 3))
    assert [e.episode_id for e in make(dataset).episodes] == [0, 2]
    assert [e.episode_id for e in make(dataset, split="held_out").episodes] == [1, 3]
    assert [e.episode_id for e in make(dataset, split="all").episodes] == [0, 1, 2, 3]
    assert [e.episode_id for e in make(dataset, split="all", tasks=[1]).episodes] == [1, 3]
    dataset.episodes[0] = dataclasses.replace(dataset.episodes[0], success=False)
    dataset.episodes[1] = dataclasses.replace(dataset.episodes[1], suite="libero_goal")
    dataset.episodes[2] = dataclasses.replace(dataset.episodes[2], suite="", success=None)
    assert [e.episode_id for e in make(dataset, split="all").episodes] == [2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [7]}, "no successful episode.*task ids \\[0, 1\\]"),
        ({"suite": "libero_goal"}, "suites \\['libero_object'\\]"),
        ({"split": "held_out"}, "0 held-out episodes"),
        ({"split": "test"}, "split='test'"),
        ({"starts": "random"}, "starts='random'"),
    ],
)
def test_impossible_requests_say_what_there_is(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_start_holds_what_was_recorded():
    dataset = ToyDataset()
    start = make(dataset).load(1, 6)
    whole = dataset.read(1)
    assert start.steps == 8
    np.testing.assert_array_equal(start.context_images, whole.images[4:7])
    np.testing.assert_array_equal(start.context_proprio, whole.proprio[4:7])
    np.testing.assert_array_equal(start.images, whole.images[7:15])
    np.testing.assert_array_equal(start.actions, whole.actions[6:18])


def test_context_before_the_beginning_repeats_the_first_frame():
    dataset = ToyDataset()
    start = make(dataset).load(1, 1)
    whole = dataset.read(1)
    np.testing.assert_array_equal(start.context_images, whole.images[[0, 0, 1]])


def test_end_of_the_episode_shortens_and_pads():
    dataset = ToyDataset((6,))
    start = make(dataset).load(0, 3)
    whole = dataset.read(0)
    assert start.steps == 2
    assert start.images.shape[0] == 2
    np.testing.assert_array_equal(start.actions[:3], whole.actions[3:])
    np.testing.assert_array_equal(start.actions[3:], np.repeat(whole.actions[-1:], 9, 0))


def test_too_short_an_episode_offers_its_first_frame():
    starts = make(ToyDataset((5, 4)))
    rng = np.random.default_rng(0)
    assert {starts.draw(rng) for _ in range(50)} == {(0, 0), (1, 0)}


def test_starts_are_read_once_and_forgotten_beyond_the_bound():
    dataset = ToyDataset()
    starts = make(dataset)
    first = starts.load(0, 0)
    assert starts.load(0, 0) is first
    assert dataset.reads == 1
    small = make(dataset, cache=ByteCache(int(first.nbytes * 1.5)))
    for key in ((0, 0), (0, 1), (0, 0)):
        small.load(*key)
    assert dataset.reads == 4


def test_images_of_another_size_are_resized():
    dataset = ToyDataset()
    start = make(dataset, image_size=(20, 30)).load(0, 2)
    expected = resize(dataset.read(0).images, (20, 30))
    np.testing.assert_array_equal(start.context_images, expected[:3])
    np.testing.assert_array_equal(start.images, expected[3:11])


def test_cache_forgets_the_least_recently_used():
    cache = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    cache.put("a", 5, 6)
    assert (cache.get("a"), cache.bytes, len(cache)) == (5, 10, 2)
    cache.put("huge", 0, 11)
    assert cache.get("huge") is None
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


# Worlds and datasets by name.


@pytest.mark.parametrize("suite", ["libero_goal", "libero_objekt"])
def test_suites_without_shipped_demonstrations(suite):
    with pytest.raises(ValueError, match=f"suite='{suite}'.* 'libero_object', .*wmgym record"):
        resolve_dataset(None, suite)


def test_world_is_loaded_once_until_it_is_written_anew(tmp_path, monkeypatch):
    folder = tmp_path / "one" / "world"
    save_world(folder, model(seed=0))
    monkeypatch.chdir(tmp_path)
    first = resolve_world("one/world", "cpu", "float32")
    assert resolve_world(folder, "cpu", "float32") is first
    monkeypatch.chdir(tmp_path / "one")
    assert resolve_world("world", "cpu", "float32") is first
    save_world(folder, model(seed=1))
    os.utime(folder / WEIGHTS, ns=(0, 1))
    assert resolve_world("world", "cpu", "float32") is not first
    save_world(tmp_path / "two" / "world", model(seed=0))
    monkeypatch.chdir(tmp_path / "two")
    assert resolve_world("world", "cpu", "float32") is not first
    with pytest.raises(CheckpointError, match="no world"):
        resolve_world(tmp_path, "cpu", "float32")


def test_dataset_is_loaded_once_until_it_is_written_anew(tmp_path, tiny_dataset, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(tiny_dataset, folder)
    monkeypatch.chdir(tmp_path)
    first = resolve_dataset("data", "libero_object")
    assert resolve_dataset(folder, "libero_object") is first
    os.utime(folder / INFO_PATH, ns=(0, 1))
    assert resolve_dataset("data", "libero_object") is not first
    with pytest.raises(DatasetError, match="not a folder"):
        resolve_dataset("nowhere", "libero_object")
