from __future__ import annotations

import json

import numpy as np
import pytest
from coded_episodes import LENGTHS, make_episode

from wmgym.data import LeRobotDataset, Statistics, normalize_q99, unnormalize_q99
from wmgym.data.statistics import VectorStatistics


def test_equals_numpy_on_all_steps(joined_root, episodes):
    statistics = Statistics.of([LeRobotDataset(joined_root)])
    for vector, name in ((statistics.action, "actions"), (statistics.proprio, "proprio")):
        values = np.concatenate([getattr(e, name) for e in episodes]).astype(np.float64)
        np.testing.assert_allclose(vector.mean, values.mean(0))
        np.testing.assert_allclose(vector.std, values.std(0))
        np.testing.assert_array_equal(vector.min, values.min(0))
        np.testing.assert_array_equal(vector.max, values.max(0))
        np.testing.assert_allclose(vector.q01, np.percentile(values, 1, axis=0))
        np.testing.assert_allclose(vector.q99, np.percentile(values, 99, axis=0))
    assert statistics.action.mask.tolist() == [True] * 6 + [False]
    assert statistics.proprio.mask.all()
    assert (statistics.num_transitions, statistics.num_trajectories) == (sum(LENGTHS), 4)


def test_filter_and_datasets_that_only_read_whole_episodes(joined_root):
    class Plain:
        """A dataset with nothing but the protocol."""

        episodes = LeRobotDataset(joined_root).episodes

        def read(self, episode_id, start=0, stop=None, *, wrist=False):
            return make_episode(episode_id, LENGTHS[episode_id])

    def keep(info):
        return not info.held_out

    a = Statistics.of([LeRobotDataset(joined_root)], keep)
    b = Statistics.of([Plain()], keep)
    assert a.num_trajectories == 2
    assert a.to_dict() == b.to_dict()
    with pytest.raises(ValueError, match="no episode passes"):
        Statistics.of([Plain()], lambda info: False)


def test_file_round_trip_and_published_shape(joined_root, tmp_path):
    statistics = Statistics.of([LeRobotDataset(joined_root)])
    path = tmp_path / "dataset_statistics.json"
    statistics.save(path, "libero_object")
    entries = json.loads(path.read_text())["libero_object"]
    assert set(entries) == {"action", "proprio", "num_transitions", "num_trajectories"}
    names = {"mean", "std", "min", "max", "q01", "q99", "mask"}
    assert set(entries["action"]) == names
    assert len(entries["action"]["q01"]) == 7
    assert Statistics.load(path).to_dict() == statistics.to_dict()
    assert Statistics.load(path, "libero_object").to_dict() == statistics.to_dict()
    with pytest.raises(ValueError, match="name='other', allowed are libero_object"):
        Statistics.load(path, "other")


def test_published_files_have_no_mask_for_proprio():
    entries = {name: [0.0, 1.0] for name in ("mean", "std", "min", "max", "q01", "q99")}
    assert VectorStatistics.from_dict(entries).mask.tolist() == [True, True]
    with pytest.raises(ValueError, match="lack q99"):
        VectorStatistics.from_dict({k: v for k, v in entries.items() if k != "q99"})


def vector(q01, q99, mask, low=-9.0, high=9.0):
    n = len(q01)
    zeros = np.zeros(n)
    return VectorStatistics(
        mean=zeros, std=zeros, min=np.full(n, low), max=np.full(n, high),
        q01=np.array(q01), q99=np.array(q99), mask=np.array(mask),
    )  # fmt: skip


def test_percentiles_go_to_the_bounds_and_beyond_is_clipped():
    statistics = vector([-0.5, 0.0], [1.5, 2.0], [True, False])
    values = np.array([[-0.5, -0.5], [0.5, 0.5], [1.5, 1.5], [7.0, 7.0], [-7.0, -7.0]])
    expected = [[-1, -0.5], [0, 0.5], [1, 1.5], [1, 7], [-1, -7]]
    normalized = normalize_q99(values, statistics)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


def test_unnormalize_inverts_what_was_not_clipped():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(500, 7))
    data[:, 4] = 0.3
    statistics = VectorStatistics.of(data, np.arange(7) < 6)
    inside = np.clip(data, statistics.q01, statistics.q99).reshape(5, 100, 7)
    normalized = normalize_q99(inside, statistics)
    assert np.abs(normalized[..., :6]).max() <= 1.0
    np.testing.assert_array_equal(normalized[..., 4], 0.0)
    np.testing.assert_allclose(unnormalize_q99(normalized, statistics), inside, atol=1e-6)


def test_values_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 7\), expected \(N, D\)"):
        VectorStatistics.of(np.zeros((0, 7)))
