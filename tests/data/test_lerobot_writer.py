from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from coded_episodes import LENGTHS, decoded_numbers, make_episode
from folders import contents

from wmgym.data import (
    DatasetError,
    LeRobotDataset,
    assemble,
    stage_episode,
    staged_names,
    subset,
)

NAMES = [f"episode-{i}" for i in range(len(LENGTHS))]


def test_staged_description_is_what_was_given(tmp_path, episodes):
    info = stage_episode(tmp_path, "episode-1", episodes[1])
    assert staged_names(tmp_path) == ["episode-1"]
    assert info.length == LENGTHS[1]
    assert info.instruction == episodes[1].info.instruction
    assert info.extra["fixture"] == {"cabinet": [0.0, 1.0, 2.0]}


def test_assembling_twice_gives_the_same_bytes(staging, tmp_path):
    a = assemble(staging, tmp_path / "a", NAMES, episodes_per_file=3)
    b = assemble(staging, tmp_path / "b", NAMES, episodes_per_file=3)
    assert contents(a) == contents(b)


def test_staging_twice_gives_the_same_bytes(staging, tmp_path, episodes):
    stage_episode(tmp_path, "again", episodes[0])
    assert contents(tmp_path / "again") == contents(staging / "episode-0")


def test_order_is_the_order_of_the_names(staging, tmp_path):
    order = [2, 0, 3]
    root = assemble(staging, tmp_path / "out", [NAMES[i] for i in order], episodes_per_file=2)
    dataset = LeRobotDataset(root)
    for new, old in enumerate(order):
        codes = 1000 * old + np.arange(LENGTHS[old])
        np.testing.assert_array_equal(decoded_numbers(dataset.read(new).images), codes)


def test_tables_follow_the_format(root, episodes):
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["total_episodes"] == len(LENGTHS)
    assert info["total_frames"] == sum(LENGTHS)
    assert info["total_tasks"] == 2
    assert info["splits"] == {"train": f"0:{len(LENGTHS)}"}
    assert info["features"]["sim_state"]["shape"] == [20 + len(LENGTHS) - 1]

    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert tasks.to_pydict() == {
        "task_index": [0, 1],
        "task": ["pick up object 0", "pick up object 1"],
    }
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]

    steps = [pq.read_table(p) for p in sorted(root.glob("data/*/*.parquet"))]
    columns = {
        name: np.concatenate([t[name].to_numpy() for t in steps])
        for name in (
            "index",
            "episode_index",
            "frame_index",
            "task_index",
            "timestamp",
            "next.done",
        )
    }
    numbers = [np.arange(n) for n in LENGTHS]
    np.testing.assert_array_equal(columns["index"], np.arange(sum(LENGTHS)))
    np.testing.assert_array_equal(columns["episode_index"], np.repeat(np.arange(4), LENGTHS))
    np.testing.assert_array_equal(columns["task_index"], np.repeat([0, 1, 0, 1], LENGTHS))
    np.testing.assert_array_equal(columns["frame_index"], np.concatenate(numbers))
    np.testing.assert_allclose(columns["timestamp"], np.concatenate(numbers) / 20, rtol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(columns["next.done"]), np.cumsum(LENGTHS) - 1)
    declared = {k for k, f in info["features"].items() if f["dtype"] != "video"}
    assert all(set(table.column_names) == declared for table in steps)

    table = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    ends = np.cumsum(LENGTHS)
    assert [row["dataset_to_index"] for row in table] == ends.tolist()
    assert [row["dataset_from_index"] for row in table] == [0, *ends[:-1].tolist()]
    for key in ("observation.images.image", "observation.images.wrist_image"):
        for row in table:
            duration = row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"]
            assert duration == pytest.approx(row["length"] / 20)

    stats = json.loads((root / "meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0))
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    image = stats["observation.images.image"]
    keyframes = np.concatenate([e.images[::10] for e in episodes]) / 255
    assert image["count"] == [len(keyframes)]
    np.testing.assert_allclose(np.squeeze(image["mean"]), keyframes.mean((0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(np.squeeze(image["std"]), keyframes.std((0, 1, 2)), atol=0.01)
    assert np.shape(image["q01"]) == (3, 1, 1)


def stage_for_ever(folder):
    for number in range(10_000):
        stage_episode(folder, f"episode-{number:05d}", make_episode(1, 60))


def test_a_killed_worker_leaves_whole_episodes_or_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt, delay in enumerate((0.25, 0.4)):
        folder = tmp_path / str(attempt)
        worker = context.Process(target=stage_for_ever, args=(folder,))
        worker.start()
        deadline = time.monotonic() + 15
        while not staged_names(folder) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delay)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        names = staged_names(folder)
        assert names
        dataset = LeRobotDataset(assemble(folder, folder / "out.dataset", names))
        for info in dataset.episodes:
            np.testing.assert_array_equal(
                decoded_numbers(dataset.read(info.episode_id).images), 1000 + np.arange(60)
            )


def test_leftovers_are_ignored_and_overwritten(tmp_path, episodes):
    left = tmp_path / "episode.part"
    left.mkdir()
    (left / "info.json").write_text('{"fps": 20')
    assert staged_names(tmp_path) == []
    stage_episode(tmp_path, "episode", episodes[1])
    assert staged_names(tmp_path) == ["episode"]
    assert not left.exists()
    assert staged_names(tmp_path / "nowhere") == []


def test_an_interrupted_assembly_is_no_dataset_and_can_be_repeated(staging, tmp_path):
    (tmp_path / "out.part" / "data").mkdir(parents=True)
    with pytest.raises(DatasetError):
        assemble(staging, tmp_path / "out", [*NAMES, "lost"])
    assert not (tmp_path / "out").exists()
    root = assemble(staging, tmp_path / "out", NAMES)
    assert len(LeRobotDataset(root).episodes) == len(LENGTHS)
    assert not (tmp_path / "out.part").exists()


def test_nothing_is_overwritten(staging, tmp_path, episodes):
    with pytest.raises(FileExistsError, match="staged already"):
        stage_episode(staging, "episode-0", episodes[0])
    with pytest.raises(FileExistsError, match="exists"):
        assemble(staging, tmp_path, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proprio": np.full((12, 8), np.nan, np.float32)}, "proprio contains NaN"),
        ({"actions": np.zeros((11, 7), np.float32)}, "actions has 11 steps"),
        ({"images": np.zeros((12, 63, 64, 3), np.uint8)}, "even sizes"),
        ({"images": np.zeros((12, 64, 64, 3), np.float32)}, "expected uint8"),
        ({"start": 3}, "whole episode"),
    ],
)
def test_a_bad_episode_is_refused(tmp_path, episodes, change, message):
    with pytest.raises(ValueError, match=message):
        stage_episode(tmp_path, "bad", dataclasses.replace(episodes[1], **change))
    assert staged_names(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", "x.part"])
def test_a_bad_name_is_refused(tmp_path, episodes, name):
    with pytest.raises(ValueError, match="plain file name"):
        stage_episode(tmp_path, name, episodes[1])


def test_episodes_that_do_not_fit_together_are_refused(tmp_path, episodes):
    stage_episode(tmp_path, "a", episodes[0])
    stage_episode(tmp_path, "b", dataclasses.replace(episodes[1], wrist_images=None))
    small = dataclasses.replace(episodes[1], images=episodes[1].images[:, ::2, ::2])
    stage_episode(tmp_path, "c", small)
    with pytest.raises(ValueError, match="must have the same"):
        assemble(tmp_path, tmp_path / "out", ["a", "b"])
    with pytest.raises(ValueError, match=r"image has shape \[32, 32, 3\]"):
        assemble(tmp_path, tmp_path / "out", ["a", "c"])
    with pytest.raises(ValueError, match="at least one"):
        assemble(tmp_path, tmp_path / "out", [])
    with pytest.raises(ValueError, match="fps=20, not 10"):
        assemble(tmp_path, tmp_path / "out", ["a"], fps=10)


def test_a_damaged_staged_video_is_named(tmp_path, episodes):
    stage_episode(tmp_path, "a", episodes[0])
    path = tmp_path / "a" / "observation.images.image.mp4"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"observation\.images\.image\.mp4"):
        assemble(tmp_path, tmp_path / "out", ["a"])


def test_a_subset_holds_the_same_frames_and_numbers(root, tmp_path):
    order = [3, 1, 2]
    small = LeRobotDataset(subset(root, tmp_path / "small", order, episodes_per_file=2))
    big = LeRobotDataset(root)
    for new, old in enumerate(order):
        a, b = small.read(new, wrist=True), big.read(old, wrist=True)
        for name in ("images", "wrist_images", "proprio", "actions", "clean_actions", "sim_states"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert dataclasses.replace(a.info, episode_id=old) == b.info


def test_a_subset_may_drop_simulator_states_and_wrist(joined_root, tmp_path):
    out = subset(joined_root, tmp_path / "out", [1], keep_sim_states=False, keep_wrist=False)
    dataset = LeRobotDataset(out)
    episode = dataset.read(0)
    assert episode.sim_states is None
    assert dataset.keys.wrist_image is None
    assert not list(out.rglob("*wrist*"))
    np.testing.assert_array_equal(decoded_numbers(episode.images), 1000 + np.arange(LENGTHS[1]))


def test_a_subset_of_a_subset_of_everything_is_everything(joined_root, tmp_path):
    everything = range(len(LENGTHS))
    a = subset(joined_root, tmp_path / "a", everything)
    b = subset(a, tmp_path / "b", everything)
    assert contents(a) == contents(b)


def test_a_subset_names_a_missing_episode(joined_root, tmp_path):
    with pytest.raises(IndexError, match=r"episode 9 .* 0 \.\.\. 3"):
        subset(joined_root, tmp_path / "out", [9])
