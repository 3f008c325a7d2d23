from __future__ import annotations

import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coded_episodes import LENGTHS, WRIST_OFFSET, coded_frames, decoded_numbers
from PIL import Image

from wmgym.data import Dataset, DatasetError, LeRobotDataset, LeRobotKeys


def test_reads_back_what_was_written(root, episodes):
    dataset = LeRobotDataset(root)
    assert isinstance(dataset, Dataset)
    assert [info.length for info in dataset.episodes] == list(LENGTHS)
    for i, written in enumerate(episodes):
        read = dataset.read(i, wrist=True)
        codes = 1000 * i + np.arange(len(written))
        np.testing.assert_array_equal(decoded_numbers(read.images), codes)
        np.testing.assert_array_equal(decoded_numbers(read.wrist_images), codes + WRIST_OFFSET)
        for name in ("proprio", "actions", "clean_actions", "sim_states"):
            ours, theirs = getattr(read, name), getattr(written, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        info = read.info
        assert info == dataset.episodes[i]
        assert info.episode_id == i
        for name in ("instruction", "suite", "task_id", "init_state_id", "seed", "success"):
            assert getattr(info, name) == getattr(written.info, name)
        assert info.extra == {"noise": 0.25, "fixture": {"cabinet": [0.0, 1.0, 2.0]}}
    assert [info.held_out for info in dataset.episodes] == [False, False, True, True]


def test_random_access_equals_a_slice_of_the_whole(root):
    dataset = LeRobotDataset(root)
    rng = np.random.default_rng(0)
    whole = [dataset.read(i, wrist=True) for i in range(len(LENGTHS))]
    for _ in range(40):
        i = int(rng.integers(len(LENGTHS)))
        start = int(rng.integers(LENGTHS[i]))
        stop = int(rng.integers(start + 1, LENGTHS[i] + 1))
        part = dataset.read(i, start, stop, wrist=True)
        assert part.start == start
        assert len(part) == stop - start
        for name in ("images", "wrist_images", "proprio", "actions", "clean_actions", "sim_states"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole[i], name)[start:stop])
        if stop < LENGTHS[i]:
            assert not np.array_equal(part.images[-1], whole[i].images[stop])


def test_wrist_images_are_read_only_when_asked_for(root):
    assert LeRobotDataset(root).read(0).wrist_images is None


def test_numbers_are_read_without_videos(root, episodes, tmp_path):
    copy = shutil.copytree(root, tmp_path / "dataset")
    shutil.rmtree(copy / "videos")
    dataset = LeRobotDataset(copy)
    proprio, actions = dataset.read_numbers(2)
    np.testing.assert_array_equal(proprio, episodes[2].proprio)
    np.testing.assert_array_equal(actions, episodes[2].actions)


def test_a_small_cache_changes_nothing(root):
    big, small = LeRobotDataset(root), LeRobotDataset(root, cache_bytes=0)
    for i in (3, 0, 2, 1, 0):
        np.testing.assert_array_equal(big.read(i).sim_states, small.read(i).sim_states)


@pytest.mark.parametrize(("cache_bytes", "kept"), [(0, 1), (1, 1), (2**20, 3)])
def test_row_groups_are_kept_within_the_bound_and_the_last_one_always(
    public_root, cache_bytes, kept
):
    root, numbers = public_root
    dataset = pickle.loads(pickle.dumps(LeRobotDataset(root, cache_bytes=cache_bytes)))
    for _ in range(2):  # three row groups of the first file
        np.testing.assert_array_equal(dataset.read_numbers(0)[0], numbers[0][0])
        assert len(dataset._tables._groups) == kept


def test_threads_and_pickles_read_the_same(root):
    dataset = LeRobotDataset(root)
    copy = pickle.loads(pickle.dumps(dataset))
    expected = [dataset.read(i).images for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: copy.read(i % 4).images, range(12)))
    for i, images in enumerate(read):
        np.testing.assert_array_equal(images, expected[i % 4])


def test_rotate180_turns_every_image(root):
    plain, turned = LeRobotDataset(root), LeRobotDataset(root, rotate180=True)
    a, b = plain.read(1, wrist=True), turned.read(1, wrist=True)
    np.testing.assert_array_equal(a.images[:, ::-1, ::-1], b.images)
    np.testing.assert_array_equal(a.wrist_images[:, ::-1, ::-1], b.wrist_images)
    assert plain.fingerprint() != turned.fingerprint()


@pytest.mark.parametrize("place", [(4, 0, None), (-1, 0, None), (0, 0, 24), (0, 5, 5), (0, -1, 3)])
def test_no_such_episode_or_steps(joined_root, place):
    with pytest.raises(IndexError, match=r"allowed are|expected"):
        LeRobotDataset(joined_root).read(*place)


@pytest.fixture
def damaged(tmp_path, joined_root):
    return shutil.copytree(joined_root, tmp_path / "dataset")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("pattern", ["videos/*.image/*/*.mp4", "data/*/*.parquet"])
def test_a_truncated_file_is_named(damaged, pattern, share):
    path = next(damaged.glob(pattern))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DatasetError, match=path.name):
        LeRobotDataset(damaged).read(3)


def test_a_video_whose_end_is_lost_behind_a_good_header_is_named(damaged):
    path = next(damaged.glob("videos/*.image/*/*.mp4"))
    shorter = path.with_suffix(".part")
    with av.open(str(path)) as source, av.open(str(shorter), "w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.pts is not None and packet.pts * packet.time_base < 3.0:
                packet.stream = stream
                out.mux(packet)
    shorter.replace(path)
    dataset = LeRobotDataset(damaged)
    assert len(dataset.read(0)) == LENGTHS[0]
    with pytest.raises(DatasetError, match=path.name):
        dataset.read(3)


def test_a_missing_file_is_named(damaged):
    next(damaged.glob("videos/*.image/*/*.mp4")).unlink()
    with pytest.raises(DatasetError, match=r"file-000\.mp4 is missing"):
        LeRobotDataset(damaged).read(0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        LeRobotDataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"info\.json is missing"):
        LeRobotDataset(tmp_path)


def edit_info(root, **entries):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_an_older_version_is_told_to_convert(damaged):
    edit_info(damaged, codebase_version="v2.1")
    with pytest.raises(DatasetError, match=r"'v2\.1', only v3\.x.*[Cc]onvert"):
        LeRobotDataset(damaged)


def test_damaged_info_is_named(damaged):
    path = damaged / "meta" / "info.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DatasetError, match=r"info\.json is damaged"):
        LeRobotDataset(damaged)


def test_unknown_features_are_listed(damaged):
    features = json.loads((damaged / "meta" / "info.json").read_text())["features"]
    features["camera_7"] = features.pop("observation.images.image")
    edit_info(damaged, features=features)
    with pytest.raises(DatasetError, match=r"'image'.*features present: .*camera_7"):
        LeRobotDataset(damaged)


def test_wrong_keys_are_refused(joined_root):
    keys = LeRobotKeys(image="nope", proprio="observation.state", action="action")
    with pytest.raises(DatasetError, match=r"keys\.image='nope'.*observation\.images\.image"):
        LeRobotDataset(joined_root, keys=keys)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def public_root(tmp_path_factory):
    """Other names, images in parquet, two files with a row group across episodes, other columns."""
    root = tmp_path_factory.mktemp("public") / "libero"
    rng = np.random.default_rng(3)
    lengths = [9, 6, 11]
    rows = {"episodes": [], 0: [], 1: []}
    numbers = []
    for e, length in enumerate(lengths):
        file = 0 if e < 2 else 1
        rows["episodes"].append(
            {
                "episode_index": e,
                "tasks": [f"task {e}"],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": sum(lengths[:e]),
                "dataset_to_index": sum(lengths[: e + 1]),
                "stats/action/min": [0.0],
            }
        )
        state = rng.normal(size=(length, 8)).astype(np.float32)
        action = rng.normal(size=(length, 7)).astype(np.float32)
        numbers.append((state, action))
        images = coded_frames(1000 * e + np.arange(length))
        for t in range(length):
            image = {"bytes": png(images[t]), "path": f"frame-{t:06d}.png"}
            wrist = {"bytes": png(255 - images[t]), "path": f"frame-{t:06d}.png"}
            rows[file].append(
                {
                    "image": image,
                    "wrist_image": wrist,
                    "state": state[t].tolist(),
                    "actions": action[t].tolist(),
                    "timestamp": t / 10,
                    "frame_index": t,
                    "episode_index": e,
                    "index": sum(lengths[:e]) + t,
                    "task_index": e,
                }
            )
    camera = {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
    features = {
        "image": camera,
        "wrist_image": camera,
        "state": {"dtype": "float32", "shape": [8], "names": ["state"]},
        "actions": {"dtype": "float32", "shape": [7], "names": ["actions"]},
    }
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    for file in (0, 1):
        table = pa.Table.from_pylist(rows[file])
        pq.write_table(table, root / f"data/chunk-000/file-00{file}.parquet", row_group_size=4)
    episodes = pa.Table.from_pylist(rows["episodes"][::-1])
    pq.write_table(episodes, root / "meta/episodes/chunk-000/file-000.parquet")
    return root, numbers


def test_a_public_dataset_with_other_names_and_encoded_images(public_root):
    root, numbers = public_root
    dataset = LeRobotDataset(root)
    assert dataset.keys == LeRobotKeys(
        image="image", wrist_image="wrist_image", proprio="state", action="actions"
    )
    for e, (state, action) in enumerate(numbers):
        episode = dataset.read(e, 2, len(state) - 1, wrist=True)
        np.testing.assert_array_equal(episode.proprio, state[2:-1])
        np.testing.assert_array_equal(episode.actions, action[2:-1])
        codes = 1000 * e + np.arange(2, len(state) - 1)
        np.testing.assert_array_equal(episode.images, coded_frames(codes))
        np.testing.assert_array_equal(episode.wrist_images, 255 - coded_frames(codes))
        assert episode.clean_actions is None
        assert episode.sim_states is None
        info = episode.info
        assert info.instruction == f"task {e}"
        assert (info.suite, info.task_id, info.init_state_id, info.seed) == ("", e, -1, -1)
        assert info.success is None
        assert not info.held_out


def test_names_of_cameras_are_found():
    numbers = {"observation.state": {}, "action": {}}
    cases = [("image", "image2"), ("image", "wrist_image"), ("agentview", "wrist")]
    for image, wrist in cases:
        features = {f"observation.images.{name}": {} for name in (image, wrist)} | numbers
        keys = LeRobotKeys.detect(features, where="info.json")
        assert keys.image == f"observation.images.{image}"
        assert keys.wrist_image == f"observation.images.{wrist}"


def test_wrist_of_a_dataset_without_one(joined_root):
    keys = LeRobotKeys(
        image="observation.images.image", proprio="observation.state", action="action"
    )
    with pytest.raises(ValueError, match="no wrist camera"):
        LeRobotDataset(joined_root, keys=keys).read(0, wrist=True)
