from __future__ import annotations

import numpy as np
import pytest
from coded_episodes import LENGTHS, coded_frames, decoded_numbers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from wmgym.data import DatasetError, EpisodeInfo, FrameCache, LeRobotDataset, WindowSampler, subset
from wmgym.data.frame_cache import resize
from wmgym.data.windows import window_rows, window_starts


@pytest.fixture(scope="module")
def cache():
    """Two episodes of 6 and 9 steps whose every number tells episode and step."""
    lengths = [6, 9]
    codes = np.concatenate([100 * e + np.arange(n) for e, n in enumerate(lengths)])
    return FrameCache(
        frames=coded_frames(codes),
        proprio=codes[:, None].repeat(8, 1).astype(np.float32),
        actions=codes[:, None].repeat(7, 1).astype(np.float32),
        clean_actions=codes[:, None].repeat(7, 1).astype(np.float32) + 0.5,
        starts=np.array([0, 6, 15]),
        episodes=[EpisodeInfo(e, n, "task") for e, n in enumerate(lengths)],
    )


def codes_of(batch):
    b, n = batch["frames"].shape[:2]
    frames = batch["frames"].reshape(b * n, *batch["frames"].shape[2:])
    return decoded_numbers(frames).reshape(b, n)


def test_windows_are_all_that_fit():
    starts = np.array([0, 6, 9, 15])
    np.testing.assert_array_equal(window_starts(starts, 4), [0, 1, 9, 10])
    np.testing.assert_array_equal(window_starts(starts, 1), [0, 1, 2, 3, 4, 6, 7, *range(9, 14)])


def test_the_past_is_clamped_to_the_episode_start():
    rows = window_rows(np.array([0, 1, 6, 8]), np.array([0, 6, 15]), context=3, horizon=2)
    expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [6, 6, 6, 7, 8], [6, 7, 8, 9, 10]]
    np.testing.assert_array_equal(rows, expected)


def test_a_window_holds_the_steps_it_says(cache):
    sampler = WindowSampler(cache, horizon=3, context=2)
    assert len(sampler) == 3 + 6
    assert [sampler.locate(i) for i in (0, 2, 3, 8)] == [(0, 0), (0, 2), (1, 0), (1, 5)]
    batch = sampler.gather(np.arange(len(sampler)))
    assert batch["frames"].dtype == np.uint8
    for i in range(len(sampler)):
        episode, t = sampler.locate(i)
        steps = 100 * episode + np.maximum(np.arange(t - 1, t + 4), 0)
        np.testing.assert_array_equal(codes_of(batch)[i], steps)
        np.testing.assert_array_equal(batch["proprio"][i, :, 0], steps)
        np.testing.assert_array_equal(batch["actions"][i, :, 6], 100 * episode + t + np.arange(3))
        np.testing.assert_array_equal(batch["clean_actions"][i], batch["actions"][i] + 0.5)
    np.testing.assert_array_equal(batch["offsets"], np.tile([1, 2, 3], (9, 1)))


def test_the_last_window_ends_at_the_last_observation(cache):
    sampler = WindowSampler(cache, horizon=5)
    np.testing.assert_array_equal(
        codes_of(sampler.gather(np.array([0, len(sampler) - 1])))[:, -1], [5, 108]
    )


def test_target_frames_are_those_of_their_offsets(cache):
    sampler = WindowSampler(cache, horizon=4, context=2, seed=5)
    seen, rng = set(), np.random.default_rng(0)
    for step in range(30):
        offsets = np.sort(rng.permuted(np.tile([1, 2, 3, 4], (8, 1)), axis=1)[:, :2], axis=1)
        batch = sampler.gather(sampler.indices(step, 8), offsets)
        full = sampler.gather(sampler.indices(step, 8))
        assert batch["frames"].shape[1] == 2 + 2
        np.testing.assert_array_equal(batch["offsets"], offsets)
        future = codes_of(full)[:, 2:]
        chosen = np.take_along_axis(future, batch["offsets"] - 1, 1)
        np.testing.assert_array_equal(codes_of(batch), np.c_[codes_of(full)[:, :2], chosen])
        np.testing.assert_array_equal(batch["proprio"], full["proprio"])
        seen |= set(batch["offsets"].ravel().tolist())
    assert seen == {1, 2, 3, 4}


def test_a_resumed_sampler_draws_the_same(cache):
    def draws(steps):
        sampler = WindowSampler(cache, horizon=3, seed=11)
        return [sampler.gather(sampler.indices(s, 6)) for s in steps]

    for a, b in zip(draws(range(10))[4:], draws(range(4, 10)), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    sampler, other = (WindowSampler(cache, horizon=3, seed=s) for s in (11, 12))
    assert not np.array_equal(sampler.indices(0, 32), other.indices(0, 32))
    assert not np.array_equal(sampler.indices(0, 32), sampler.indices(1, 32))


def test_every_window_is_drawn(cache):
    sampler = WindowSampler(cache, horizon=3)
    drawn = np.bincount(sampler.indices(0, 9000), minlength=len(sampler))
    assert abs(drawn - 1000).max() < 150


def test_bad_arguments_are_refused(cache):
    with pytest.raises(ValueError, match="longest episode has 9 steps"):
        WindowSampler(cache, horizon=9)
    with pytest.raises(ValueError, match="allowed are integers >= 1"):
        WindowSampler(cache, horizon=3, context=0)


class Counting(LeRobotDataset):
    reads = 0

    def read(self, *args, **kwargs):
        type(self).reads += 1
        return super().read(*args, **kwargs)


@pytest.fixture
def dataset(joined_root):
    Counting.reads = 0
    return Counting(joined_root)


def test_a_cache_holds_the_decoded_frames(dataset, tmp_path):
    cache = FrameCache.build([dataset, dataset], tmp_path / "cache", progress=False)
    assert cache.image_size == (64, 64)
    assert cache.episodes == dataset.episodes * 2
    np.testing.assert_array_equal(np.diff(cache.starts), LENGTHS * 2)
    episode = dataset.read(1)
    rows = slice(cache.starts[5], cache.starts[6])
    np.testing.assert_array_equal(cache.frames[rows], episode.images)
    np.testing.assert_array_equal(cache.actions[rows], episode.actions)
    meant = episode.actions if episode.clean_actions is None else episode.clean_actions
    np.testing.assert_array_equal(cache.clean_actions[rows], meant)
    np.testing.assert_array_equal(cache.proprio[rows], episode.proprio)
    with pytest.raises(ValueError, match="read-only"):
        cache.frames[0] = 0


def test_a_cache_is_built_once_and_anew_when_the_choice_changes(dataset, joined_root, tmp_path):
    def build(datasets, **options):
        return FrameCache.build(datasets, tmp_path / "cache", progress=False, **options)

    build([dataset])
    assert Counting.reads == 4
    build([dataset])
    assert Counting.reads == 4
    trained = build([dataset], episode_filter=lambda info: not info.held_out)
    assert Counting.reads == 6
    assert [info.episode_id for info in trained.episodes] == [0, 1]
    assert build([dataset], image_size=(32, 32)).image_size == (32, 32)
    assert Counting.reads == 10
    other = Counting(subset(joined_root, tmp_path / "other", [1, 0]))
    build([other], image_size=(32, 32))
    assert Counting.reads == 12


@pytest.mark.parametrize("name", ["frames.u8", "index.safetensors"])
def test_a_damaged_cache_is_built_anew(dataset, tmp_path, name):
    path = tmp_path / "cache"
    FrameCache.build([dataset], path, progress=False)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match="frame cache"):
        FrameCache.open(path)
    cache = FrameCache.build([dataset], path, progress=False)
    assert Counting.reads == 8
    assert len(cache.frames) == sum(LENGTHS)


def test_a_cache_of_an_older_version_with_more_in_it_is_taken(dataset, tmp_path):
    FrameCache.build([dataset], tmp_path / "cache", progress=False)
    index = tmp_path / "cache" / "index.safetensors"
    with safe_open(index, "numpy") as file:
        metadata = file.metadata()
    save_file({**load_file(index), "sources": np.zeros(4, np.int64)}, index, metadata)
    assert len(FrameCache.build([dataset], tmp_path / "cache", progress=False).episodes) == 4
    assert Counting.reads == 4


def test_an_interrupted_build_is_no_cache(dataset, tmp_path):
    (tmp_path / "cache.part").mkdir()
    (tmp_path / "cache.part" / "frames.u8").write_bytes(b"1234")
    assert len(FrameCache.build([dataset], tmp_path / "cache", progress=False).episodes) == 4
    assert not (tmp_path / "cache.part").exists()


def test_an_empty_choice_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="no episode passes"):
        FrameCache.build([dataset], tmp_path / "cache", episode_filter=lambda info: False)


def test_resizing_averages_whole_blocks():
    rng = np.random.default_rng(0)
    fields = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    big = fields.repeat(8, 1).repeat(8, 2)
    assert resize(big, (32, 48)) is big
    assert resize(big, (16, 24)).shape == (2, 16, 24, 3)
    flat = np.full((1, 32, 32, 3), 77, np.uint8)
    np.testing.assert_array_equal(resize(flat, (8, 12)), np.full((1, 8, 12, 3), 77))
