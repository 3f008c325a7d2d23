from __future__ import annotations

import json

import numpy as np
import pytest
from coded_episodes import LENGTHS

from wmgym.data import LeRobotDataset, Statistics
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


def test_only_episodes_that_pass_the_filter_count(joined_root, episodes):
    dataset = LeRobotDataset(joined_root)
    statistics = Statistics.of([dataset], lambda info: not info.held_out)
    assert statistics.num_trajectories == 2
    assert statistics.num_transitions == sum(LENGTHS[:2])
    actions = np.concatenate([episode.actions for episode in episodes[:2]]).astype(np.float64)
    np.testing.assert_allclose(statistics.action.mean, actions.mean(0))
    with pytest.raises(ValueError, match="no episode passes"):
        Statistics.of([dataset], lambda info: False)


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


def test_missing_entries_are_named(joined_root, tmp_path):
    entries = Statistics.of([LeRobotDataset(joined_root)]).to_dict()
    del entries["proprio"], entries["num_transitions"]
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps({"x": entries}))
    with pytest.raises(ValueError, match="lack proprio, num_transitions; present: action, num_tra"):
        Statistics.load(path)


def test_values_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 7\), expected \(N, D\)"):
        VectorStatistics.of(np.zeros((0, 7)))
