"""Reading RLDS: values, laziness, names, damage, and what is built on a dataset."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import published_rlds as published
import pytest
import tiny
import torch
from published_rlds import INSTRUCTIONS, LENGTHS, TASKS

import wmgym  # noqa: F401 - registers the environments
from wmgym.data import (
    DatasetError,
    FrameCache,
    RLDSDataset,
    StoredDataset,
    open_dataset,
)
from wmgym.data.libero_tasks import task_numbers
from wmgym.data.rlds_format import suite_of
from wmgym.distributed import Processes
from wmgym.training import split_caches
from wmgym.worlds.evaluate import evaluate

FEATURES = [published.features(number, length) for number, length in enumerate(LENGTHS)]


def vectors(number, name):
    return np.array(FEATURES[number][name][1], np.float32).reshape(LENGTHS[number], -1)


def pictures(number, name):
    return np.stack([published.pixels(data) for data in FEATURES[number][name][1]])


@pytest.fixture
def copy(published_root, tmp_path) -> Path:
    """A copy of the version folder that a test may damage."""
    return shutil.copytree(published_root, tmp_path / "libero_object_no_noops" / "1.0.0")


# --- values -------------------------------------------------------------------------------------


def test_every_value_is_the_stored_one(published_root):
    dataset = RLDSDataset(published_root)
    assert isinstance(dataset, StoredDataset)
    assert dataset.has_wrist
    assert dataset.name == "libero_object_no_noops"
    for number, info in enumerate(dataset.episodes):
        episode = dataset.read(number, wrist=True)
        assert episode.info is info
        np.testing.assert_array_equal(episode.actions, vectors(number, "steps/action"))
        np.testing.assert_array_equal(episode.proprio, vectors(number, "steps/observation/state"))
        np.testing.assert_array_equal(episode.images, pictures(number, "steps/observation/image"))
        np.testing.assert_array_equal(
            episode.wrist_images, pictures(number, "steps/observation/wrist_image")
        )
        assert episode.images.dtype == np.uint8
        assert episode.proprio.dtype == episode.actions.dtype == np.float32


def test_episodes_are_described(published_root):
    for number, info in enumerate(RLDSDataset(published_root).episodes):
        assert (info.episode_id, info.length) == (number, LENGTHS[number])
        assert info.instruction == INSTRUCTIONS[number % 3]
        assert (info.suite, info.task_id) == ("libero_object", TASKS[number % 3])
        assert (info.init_state_id, info.seed, info.success) == (-1, -1, True)
        assert info.extra == {"file_path": f"/data/demo_{number}.hdf5"}
        assert info.held_out == (number == 9)


def test_pieces_are_those_of_the_whole(published_root):
    dataset = RLDSDataset(published_root)
    whole = dataset.read(2, wrist=True)
    for start, stop in ((0, 1), (3, 8), (11, 12), (5, None)):
        piece = dataset.read(2, start, stop, wrist=True)
        assert piece.start == start
        for name in ("images", "wrist_images", "proprio", "actions"):
            expected = getattr(whole, name)[start:stop]
            np.testing.assert_array_equal(getattr(piece, name), expected)
    assert dataset.read(2, 3, 8).wrist_images is None


@pytest.mark.parametrize("place", [(10,), (-1,), (0, 5, 5), (0, 0, 14), (0, -1, 3)])
def test_what_does_not_exist_is_refused(published_root, place):
    with pytest.raises(IndexError, match=r"allowed are 0|expected 0 <= start < stop <= 13"):
        RLDSDataset(published_root).read(*place)


@pytest.mark.parametrize(
    ("reward", "terminal", "success"), [(1, 1, True), (1, 0, True), (0, 0, False), (0, 1, None)]
)
def test_success_is_rewarded_and_failure_is_cut_off(tmp_path, reward, terminal, success):
    def changed(number, given):
        end = LENGTHS[number] - 1
        given["steps/reward"][1][end] = reward
        given["steps/is_terminal"] = ("ints", [0] * end + [terminal])
        return given

    dataset = RLDSDataset(published.write(tmp_path / "data" / "1.0.0", changes=changed))
    assert {info.success for info in dataset.episodes} == {success}


# --- laziness -----------------------------------------------------------------------------------


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what is read of binary files: a list of one number."""
    count = [0]

    class Counting(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            count[0] += len(data)
            return data

        def readinto(self, buffer):
            size = super().readinto(buffer)
            count[0] += size
            return size

    original = Path.open

    def opened(self, mode="r", buffering=-1, **options):
        if mode != "rb":
            return original(self, mode, buffering, **options)
        raw = Counting(self)
        return raw if buffering == 0 else io.BufferedReader(raw, max(buffering, 1024))

    monkeypatch.setattr(Path, "open", opened)
    return count


def test_opening_reads_little_and_steps_are_read_alone(published_root, bytes_read):
    total = sum(path.stat().st_size for path in published_root.glob("*tfrecord*"))
    dataset = RLDSDataset(published_root)
    assert 0 < bytes_read[0] < total / 4
    before = bytes_read[0]
    for number in range(len(LENGTHS)):
        dataset.read_numbers(number)
    assert bytes_read[0] - before < 4 * sum(LENGTHS) * 15 + 2000
    dataset.read(4)
    before = bytes_read[0]
    dataset.read(4, 3, 5)
    wanted = sum(len(data) for data in FEATURES[4]["steps/observation/image"][1][3:5])
    assert wanted < bytes_read[0] - before < wanted + 60 * LENGTHS[4] + 1000


def test_opening_does_not_need_the_pictures(copy):
    for path in copy.glob("*tfrecord*"):
        data = path.read_bytes()
        for number in range(len(LENGTHS)):
            for picture in FEATURES[number]["steps/observation/image"][1]:
                data = data.replace(picture, bytes(len(picture)))
        path.write_bytes(data)
    dataset = RLDSDataset(copy)
    assert [info.length for info in dataset.episodes] == list(LENGTHS)
    np.testing.assert_array_equal(dataset.read_numbers(1)[1], vectors(1, "steps/action"))
    with pytest.raises(DatasetError, match=r"record 1 is damaged: its data do not fit"):
        dataset.read(1)
    with pytest.raises(DatasetError, match=r"00000-of-00003, record 1 .* cannot be decoded"):
        RLDSDataset(copy, verify=False).read(1)


def test_a_dataset_is_pickled_and_read_by_threads(published_root):
    dataset = pickle.loads(pickle.dumps(RLDSDataset(published_root)))
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda i: len(dataset.read(i % 10)), range(40)))
    assert lengths == list(LENGTHS) * 4


# --- names --------------------------------------------------------------------------------------


def test_a_folder_of_one_version_stands_for_it(published_root, copy):
    opened = open_dataset(published_root.parent)
    assert opened.root == published_root
    assert opened.fingerprint() == open_dataset(published_root).fingerprint()
    shutil.copytree(copy, copy.with_name("2.0.0"))
    with pytest.raises(DatasetError, match=r"versions 1\.0\.0, 2\.0\.0; give one"):
        open_dataset(copy.parent)
    assert len(open_dataset(copy).episodes) == 10


def test_shards_are_called_as_the_document_says(tmp_path):
    folder = published.write(tmp_path / "libero_10_no_noops" / "1.0.0", name="liber_o10")
    dataset = RLDSDataset(folder)
    assert dataset.episodes[0].suite == "libero_10"
    assert len(dataset.read(9)) == LENGTHS[9]


@pytest.mark.parametrize(
    ("names", "suite"),
    [
        (["libero_spatial_no_noops"], "libero_spatial"),
        (["1", "libero_goal"], "libero_goal"),
        (["data", "liber_o10"], "libero_10"),
        (["libero_object_swap_no_noops"], ""),
        (["bridge"], ""),
    ],
)
def test_suites_are_told_by_names(names, suite):
    assert suite_of(names) == suite


def test_unknown_instructions_are_counted_as_they_come(tmp_path):
    def changed(number, given):
        words = b"dance" if number == 1 else b"push it"
        return given | {"steps/language_instruction": ("bytes", [words] * LENGTHS[number])}

    dataset = RLDSDataset(published.write(tmp_path / "mine" / "1.0.0", changes=changed))
    assert [info.task_id for info in dataset.episodes][:3] == [0, 1, 0]
    assert task_numbers("libero_goal", ["turn on the stove"])["turn on the stove"] == 7
    assert task_numbers("libero_goal", ["b", "turn on the stove"]) == {
        "b": 0,
        "turn on the stove": 1,
    }


@pytest.mark.libero
def test_tasks_are_liberos_own():
    from wmgym.data.libero_tasks import INSTRUCTIONS as known
    from wmgym.envs.simulator import instruction, n_tasks

    for suite, instructions in known.items():
        assert len(instructions) == n_tasks(suite)
        assert instructions == tuple(instruction(suite, i) for i in range(n_tasks(suite)))


# --- damage -------------------------------------------------------------------------------------


def rewrite(folder, **changes):
    path = folder / "dataset_info.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


DAMAGE = {
    "no folder": (shutil.rmtree, "is no RLDS dataset"),
    "missing shard": (lambda f: published.shard_path(f, 1).unlink(), "00001-of-00003 cannot be"),
    "truncated shard": (
        lambda f: published.shard_path(f, 2).write_bytes(
            published.shard_path(f, 2).read_bytes()[:-9]
        ),
        r"00002-of-00003, record 2 at byte \d+ is truncated",
    ),
    "missing records": (
        lambda f: published.shard_path(f, 2).write_bytes(b""),
        "has 0 records, dataset_info.json beside it says 3",
    ),
    "no TFRecord": (
        lambda f: published.shard_path(f, 0).write_bytes(b"\x1f\x8b" * 500),
        "no TFRecord",
    ),
    "half a document": (
        lambda f: (f / "dataset_info.json").write_text('{"name":'),
        r"dataset_info\.json is damaged",
    ),
    "no splits": (
        lambda f: (f / "dataset_info.json").write_text('{"name": "x"}'),
        "no entry splits",
    ),
    "a list": (lambda f: (f / "dataset_info.json").write_text("[]"), "is damaged"),
    "a foreign split": (lambda f: rewrite(f, splits=[{"name": "val"}]), "allowed are val"),
    "a foreign template": (
        lambda f: rewrite(
            f, splits=[{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{X}"}]
        ),
        "is damaged",
    ),
    "half a template": (
        lambda f: rewrite(
            f, splits=[{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{X"}]
        ),
        r"dataset_info\.json is damaged",
    ),
    "no number of records": (
        lambda f: rewrite(f, splits=[{"name": "train", "shardLengths": ["abc"]}]),
        r"dataset_info\.json is damaged",
    ),
    "no shards": (
        lambda f: rewrite(f, splits=[{"name": "train", "shardLengths": []}]),
        "'train' has no shards",
    ),
    "another file format": (
        lambda f: rewrite(f, fileFormat="array_record"),
        "'array_record', only 'tfrecord' is read",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(copy, name):
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        RLDSDataset(copy)


def without(key):
    return lambda number, given: {k: v for k, v in given.items() if k != key}


def with_values(key, kind, values):
    return lambda number, given: given | {key: (kind, values)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (without("steps/observation/state"), "no steps/observation/state, .* it has episode_meta"),
        (with_values("steps/action", "floats", [0.0] * 20), "20 numbers, expected 7 for each step"),
        (with_values("steps/action", "bytes", [b"abc"]), "record 0 is damaged"),
        (with_values("steps/language_instruction", "bytes", [b"\xff\xfe"]), "record 0 is damaged"),
    ],
)
def test_a_foreign_specification_is_refused(tmp_path, changes, message):
    folder = published.write(tmp_path / "x" / "1.0.0", changes=changes)
    with pytest.raises(DatasetError, match=message):
        RLDSDataset(folder)


@pytest.mark.parametrize(
    ("key", "kind", "values", "message"),
    [
        ("steps/observation/state", "floats", [0.0] * 7, "7 numbers, expected 8 for each of 13"),
        ("steps/observation/image", "bytes", [b"x"], "1 pictures in 13 steps"),
        ("steps/observation/image", "bytes", [b"x"] * 13, "cannot be decoded"),
    ],
)
def test_a_list_of_another_length_is_refused(tmp_path, key, kind, values, message):
    changes = with_values(key, kind, values)
    dataset = RLDSDataset(published.write(tmp_path / "x" / "1.0.0", changes=changes))
    with pytest.raises(DatasetError, match=message):
        dataset.read(0)


def test_a_missing_wrist_camera_is_said(tmp_path):
    changes = without("steps/observation/wrist_image")
    dataset = RLDSDataset(published.write(tmp_path / "x" / "1.0.0", changes=changes))
    assert not dataset.has_wrist
    with pytest.raises(ValueError, match="no wrist camera"):
        dataset.read(0, wrist=True)


def test_an_episode_without_the_wrist_camera_means_none(tmp_path):
    drop = without("steps/observation/wrist_image")
    some = published.write(
        tmp_path / "x" / "1.0.0", changes=lambda n, given: drop(n, given) if n == 5 else given
    )
    assert not RLDSDataset(some).has_wrist


def test_no_dataset_is_told_what_was_found(tmp_path, joined_root):
    (tmp_path / "frames").mkdir()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DatasetError, match=r"LeRobot v3.*RLDS.*it holds frames, readme\.txt"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match="absent is not a folder"):
        open_dataset(tmp_path / "absent")
    assert open_dataset(joined_root).name == "dataset"


# --- what is built on it ------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_data(copy):
    before = RLDSDataset(copy).fingerprint()
    path = published.shard_path(copy, 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert RLDSDataset(copy).fingerprint() != before


def test_frames_are_cached_at_another_size(published_root, tmp_path):
    dataset = RLDSDataset(published_root)
    cache = FrameCache.build([dataset], tmp_path / "cache", image_size=(32, 32), progress=False)
    assert cache.frames.shape == (sum(LENGTHS), 32, 32, 3)
    small = dataset.read(0).images.reshape(-1, 32, 8, 32, 8, 3).mean((2, 4))
    assert np.abs(cache.frames[: LENGTHS[0]] - small).mean() < 3


def test_a_world_is_trained_and_scored_on_it(published_root, tmp_path):
    train, validation = split_caches(
        [published_root.parent],
        tmp_path,
        image_size=32,
        validation_states=(25,),
        here=Processes(0, 1, torch.device("cpu")),
        progress=False,
    )
    assert [info.episode_id for info in train.episodes] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [info.episode_id for info in validation.episodes] == [4]
    figures = evaluate(tiny.world(), [published_root], windows=1, horizon=4, progress=False)
    assert figures["datasets"]["libero_object_no_noops"]["windows"] == 1


def test_an_environment_starts_in_it(published_root, tiny_world):
    make = {"dataset": published_root.parent, "world": str(tiny_world), "horizon": 4}
    env = gym.make_vec("WorldModel-LIBERO-v0", num_envs=3, reward="R2", action_chunk=4, **make)
    _, infos = env.reset(seed=0)
    assert set(infos["instruction"]) <= set(INSTRUCTIONS)
    assert set(infos["suite"]) == {"libero_object"}
    for action, episode_id, frame in zip(
        infos["reference_action"], infos["episode_id"], infos["frame_index"], strict=True
    ):
        recorded = vectors(episode_id, "steps/action")[frame : frame + 4]
        np.testing.assert_array_equal(action, recorded)
    _, rewards, _, truncated, _ = env.step(infos["reference_action"])
    assert np.isfinite(rewards).all()
    assert truncated.all()
    env.close()


def test_starts_are_chosen_by_liberos_tasks(published_root, tiny_world):
    make = {"dataset": published_root, "world": str(tiny_world), "reward": "R1"}
    env = gym.make("WorldModel-LIBERO-v0", tasks=[6], split="all", **make)
    assert env.reset(seed=1)[1]["instruction"] == INSTRUCTIONS[1]
    env.close()
