"""Writing RLDS: the specification, what comes back, what is left out, and interruptions."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys

import in_memory
import numpy as np
import pytest
import slow_tfrecord as slow
from coded_episodes import LENGTHS, decoded_numbers
from folders import contents
from in_memory import InMemory
from programs import kill_when

from wmgym.assets import asset_path
from wmgym.data import DatasetError, LeRobotDataset, RLDSDataset, open_dataset, write_rlds
from wmgym.data import rlds_writer as writer
from wmgym.data.rlds_writer import encode_episode, joint_states

NAME = "libero_object_no_noops"


def with_joints(episode):
    """The episode with the simulator states of a robot whose gripper is that of the proprio."""
    states = np.random.default_rng(0).normal(size=(len(episode), 20))
    states[:, 8:10] = episode.proprio[:, 6:8]
    return dataclasses.replace(episode, sim_states=states)


@pytest.fixture(scope="module")
def dataset(episodes):
    return InMemory([with_joints(episode) for episode in episodes])


@pytest.fixture(scope="module")
def written(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("rlds") / NAME
    return write_rlds(dataset, out, wrist=True, episodes_per_shard=3, progress=False)


# --- values -------------------------------------------------------------------------------------


def test_what_was_written_is_read(written, dataset, episodes):
    read = RLDSDataset(written)
    assert len(read.episodes) == len(episodes)
    for i, info in enumerate(read.episodes):
        given, episode = dataset.read(i, wrist=True), read.read(i, wrist=True)
        np.testing.assert_array_equal(episode.actions, given.actions)
        np.testing.assert_array_equal(episode.proprio, given.proprio)
        for name in ("images", "wrist_images"):
            expected = decoded_numbers(getattr(given, name))
            np.testing.assert_array_equal(decoded_numbers(getattr(episode, name)), expected)
        assert dataclasses.replace(info, extra={}) == dataclasses.replace(given.info, extra={})


def test_records_hold_the_published_features(written, dataset):
    shards = sorted((written / "1.0.0").glob("*tfrecord*"))
    assert [p.name for p in shards] == [f"{NAME}-train.tfrecord-0000{i}-of-00002" for i in (0, 1)]
    data = shards[0].read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert data[: size + 16] == slow.record(data[12 : 12 + size])
    features = slow.parse(data[12 : 12 + size])
    given, n = dataset.read(0), LENGTHS[0]
    counts = {name: (kind, len(values)) for name, (kind, values) in features.items()}
    assert counts == {
        "episode_metadata/file_path": ("bytes", 1),
        "steps/action": ("floats", 7 * n),
        "steps/discount": ("floats", n),
        "steps/is_first": ("ints", n),
        "steps/is_last": ("ints", n),
        "steps/is_terminal": ("ints", n),
        "steps/language_instruction": ("bytes", n),
        "steps/observation/image": ("bytes", n),
        "steps/observation/joint_state": ("floats", 7 * n),
        "steps/observation/state": ("floats", 8 * n),
        "steps/observation/wrist_image": ("bytes", n),
        "steps/reward": ("floats", n),
    }
    joints = np.reshape(features["steps/observation/joint_state"][1], (n, 7))
    np.testing.assert_array_equal(joints, given.sim_states[:, 1:8].astype(np.float32))
    assert features["steps/reward"][1] == [0.0] * (n - 1) + [1.0]
    assert features["steps/discount"][1] == [1.0] * n
    assert features["steps/is_first"][1] == [1] + [0] * (n - 1)
    assert features["steps/is_last"][1] == features["steps/is_terminal"][1] == [0] * (n - 1) + [1]
    assert features["episode_metadata/file_path"][1] == [
        b"libero_object/task_0/init_state_38/seed_100"
    ]


def test_success_failure_and_neither_come_back(written):
    assert [i.success for i in RLDSDataset(written).episodes] == [True, False, None, True]


def test_documents_are_those_of_tfds(written):
    info = json.loads((written / "1.0.0" / "dataset_info.json").read_text())
    shards = sorted((written / "1.0.0").glob("*tfrecord*"))
    size = sum(path.stat().st_size for path in shards) - 16 * len(LENGTHS)
    assert info == {
        "fileFormat": "tfrecord",
        "name": NAME,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": "train",
                "numBytes": str(size),
                "shardLengths": ["2", "2"],
            }
        ],
        "version": "1.0.0",
    }
    assert list_features(written) == {
        "episode_metadata/file_path": "text",
        "steps/action": ("float32", ["7"]),
        "steps/discount": ("float32", []),
        "steps/is_first": ("bool", []),
        "steps/is_last": ("bool", []),
        "steps/is_terminal": ("bool", []),
        "steps/language_instruction": "text",
        "steps/observation/image": ("uint8", ["64", "64", "3"]),
        "steps/observation/joint_state": ("float32", ["7"]),
        "steps/observation/state": ("float32", ["8"]),
        "steps/observation/wrist_image": ("uint8", ["64", "64", "3"]),
        "steps/reward": ("float32", []),
    }


def list_features(root):
    """Every feature of features.json with its type and shape, by path."""
    found = {}

    def walk(entry, path):
        if "sequence" in entry:
            walk(entry["sequence"]["feature"], path)
        elif "featuresDict" in entry:
            for name, inner in entry["featuresDict"]["features"].items():
                walk(inner, [*path, name])
        elif "text" in entry:
            found["/".join(path)] = "text"
        else:
            kind = entry.get("image") or entry["tensor"]
            shape = kind["shape"].get("dimensions", [])
            found["/".join(path)] = (kind["dtype"], shape)

    walk(json.loads((root / "1.0.0" / "features.json").read_text()), [])
    return found


def test_pictures_lose_little(tmp_path):
    shipped = LeRobotDataset(asset_path("demos", "libero_object")).read(0, 0, 12)
    info = dataclasses.replace(shipped.info, length=12)
    given = dataclasses.replace(shipped, info=info)
    for quality, bound in ((95, 2.0), (60, 5.0)):
        out = tmp_path / f"quality_{quality}"
        write_rlds(InMemory([given]), out, quality=quality, progress=False)
        error = RLDSDataset(out).read(0).images.astype(float) - given.images
        assert 0 < np.abs(error).mean() < bound
        assert quality < 95 or 20 * np.log10(255 / np.sqrt((error**2).mean())) > 40


def test_what_is_not_known_is_left_out(tmp_path, episodes):
    bare = [dataclasses.replace(e, images=e.images[:, :48], sim_states=None) for e in episodes]
    out = write_rlds(InMemory(bare), tmp_path / "bare", progress=False)
    features = list_features(out)
    assert features["steps/observation/image"] == ("uint8", ["48", "64", "3"])
    assert not {"steps/observation/wrist_image", "steps/observation/joint_state"} & features.keys()
    assert not RLDSDataset(out).has_wrist


def test_joints_are_taken_from_states_of_the_robot_only(episodes):
    assert joint_states(with_joints(episodes[0])).shape == (LENGTHS[0], 7)
    assert joint_states(episodes[0]) is None
    assert joint_states(dataclasses.replace(episodes[0], sim_states=np.zeros((23, 9)))) is None


def test_joints_of_the_shipped_demonstrations_are_the_robots():
    episode = LeRobotDataset(asset_path("demos", "libero_object")).read(0, 0, 1)
    at_rest = [0, -0.16, 0, -2.44, 0, 2.23, 0.785]  # the robot's initial joints in LIBERO, rad
    np.testing.assert_allclose(joint_states(episode)[0], at_rest, atol=0.15)


def test_a_given_file_path_is_kept(episodes):
    info = dataclasses.replace(episodes[0].info, extra={"file_path": "/data/x.hdf5"})
    features = slow.parse(encode_episode(dataclasses.replace(episodes[0], info=info)))
    assert features["episode_metadata/file_path"][1] == [b"/data/x.hdf5"]


# --- interruptions ------------------------------------------------------------------------------


def test_a_killed_writer_goes_on(tmp_path):
    out = tmp_path / "killed"
    part = tmp_path / "killed.part" / "1.0.0"
    done = part / "killed-train.tfrecord-00002-of-00012"
    kill_when([sys.executable, in_memory.__file__, out], done.exists)
    assert not out.exists()
    with pytest.raises(DatasetError):
        open_dataset(part)
    before = done.stat().st_mtime_ns
    in_memory.write(out)
    assert (out / "1.0.0" / done.name).stat().st_mtime_ns == before
    assert contents(out) == contents(in_memory.write(tmp_path / "straight" / "killed"))


def fail_after(monkeypatch, count):
    """Lets the disk be full after so many records."""
    write, written = writer.write_record, []

    def limited(file, data):
        if len(written) >= count:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        write(file, data)

    monkeypatch.setattr(writer, "write_record", limited)


def test_a_full_disk_is_said_and_complete_shards_are_kept(tmp_path, dataset, written, monkeypatch):
    out = tmp_path / NAME
    options = {"wrist": True, "episodes_per_shard": 3, "progress": False}
    with monkeypatch.context() as patched:
        fail_after(patched, 3)
        with pytest.raises(OSError, match=r"No space left.*shards are kept.*00001-of-00002"):
            write_rlds(dataset, out, **options)
    assert not out.exists()
    assert [p.name for p in (tmp_path / f"{NAME}.part/1.0.0").iterdir()] == [
        f"{NAME}-train.tfrecord-00000-of-00002"
    ]
    write_rlds(dataset, out, **options)
    assert contents(out) == contents(written)


def test_leftovers_of_other_data_are_not_taken(tmp_path, dataset, written, monkeypatch):
    out = tmp_path / NAME
    with monkeypatch.context() as patched:
        fail_after(patched, 2)
        with pytest.raises(OSError, match="No space left"):
            write_rlds(dataset, out, wrist=True, episodes_per_shard=3, quality=5, progress=False)
    write_rlds(dataset, out, wrist=True, episodes_per_shard=3, progress=False)
    assert contents(out) == contents(written)


def test_a_damaged_shard_is_written_again(tmp_path, dataset, written, monkeypatch):
    out = tmp_path / NAME
    options = {"wrist": True, "episodes_per_shard": 3, "progress": False}
    with monkeypatch.context() as patched:
        fail_after(patched, 2)
        with pytest.raises(OSError, match="No space left"):
            write_rlds(dataset, out, **options)
    shard = tmp_path / f"{NAME}.part/1.0.0/{NAME}-train.tfrecord-00000-of-00002"
    shard.write_bytes(shard.read_bytes()[:-100])
    write_rlds(dataset, out, **options)
    assert contents(out) == contents(written)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_dir": "libero-object"}, "TFDS allows letters"),
        ({"out_dir": "1st"}, "TFDS allows letters"),
        ({"quality": 0}, "quality=0: allowed are 1 to 100"),
        ({"episodes_per_shard": 0}, "episodes_per_shard=0"),
        ({"dataset": InMemory([])}, "at least one episode"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, dataset, changes, message):
    arguments = {"dataset": dataset, "out_dir": "fine"} | changes
    arguments["out_dir"] = tmp_path / arguments["out_dir"]
    with pytest.raises(ValueError, match=message):
        write_rlds(**arguments, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(written, dataset):
    with pytest.raises(FileExistsError, match="exists; remove it"):
        write_rlds(dataset, written)


def test_episodes_that_do_not_fit_together_are_refused(tmp_path, episodes):
    small = dataclasses.replace(episodes[1], images=episodes[1].images[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"episode 1 .*\(32, 32, 3\).* before it .*\(64, 64, 3\)"):
        write_rlds(InMemory([episodes[0], small]), tmp_path / "mixed", progress=False)
