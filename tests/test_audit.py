"""The audit's statistics where the answer is known, and its bookkeeping on a toy simulator."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from wmgym import audit as module
from wmgym.audit import (
    NOISE_SIZES,
    AuditConfig,
    Start,
    audit,
    audit_starts,
    disturbed,
    plot,
    spearman,
    summarise,
)
from wmgym.data import LeRobotDataset

HORIZON = 4

# --- rank correlation ---------------------------------------------------------------------------


def test_spearman_of_monotonic_values_is_one():
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_spearman_needs_two_values():
    assert math.isnan(spearman(np.zeros(0), np.zeros(0)))
    assert math.isnan(spearman(np.ones(1), np.ones(1)))


# --- noise --------------------------------------------------------------------------------------


def test_noise_has_the_size_it_says_half_of_it_steady():
    reference = np.zeros((8, 7), np.float32)
    sizes = (0.01, 0.05, 0.1)
    draws = np.stack(
        [disturbed(reference, np.random.default_rng(k), sizes)[1:] for k in range(400)]
    )
    np.testing.assert_allclose(draws.std((0, 2, 3)), sizes, rtol=0.05)
    np.testing.assert_allclose(draws.mean((0, 2, 3)), 0, atol=0.01)
    pushes = draws.mean(2).std((0, 2))  # half of the variance is common to all steps
    np.testing.assert_allclose(pushes / np.array(sizes), math.sqrt(0.5 + 0.5 / 8), rtol=0.05)


def test_noisy_chunks_stay_in_the_action_space_and_start_with_the_reference():
    reference = np.random.default_rng(0).uniform(-1, 1, (8, 7)).astype(np.float32)
    chunks = disturbed(reference, np.random.default_rng(1))
    assert chunks.shape == (1 + len(NOISE_SIZES), 8, 7)
    assert chunks.dtype == np.float32
    np.testing.assert_array_equal(chunks[0], reference)
    assert np.abs(chunks).max() <= 1
    off = np.abs(chunks[1:] - reference).mean((1, 2))
    assert (off > 0).all()
    np.testing.assert_array_equal(chunks, disturbed(reference, np.random.default_rng(1)))
    assert not np.array_equal(chunks, disturbed(reference, np.random.default_rng(2)))


# --- figures ------------------------------------------------------------------------------------


def table(imagined, real, *, starts=6, chunks=5) -> dict[str, np.ndarray]:
    return {
        "imagined_r3": imagined,
        "imagined_r2": imagined,
        "real_r3": real,
        "tip_displacement_m": -real,
        "object_displacement_m": -real,
        "start": np.repeat(np.arange(starts), chunks),
        "drift_psnr": np.tile([30.0, 28.0, 26.0], (len(real), 1)),
    }


@pytest.fixture
def real() -> np.ndarray:
    return -np.random.default_rng(0).uniform(0.01, 1, 30)


def test_a_world_that_orders_as_reality_does_is_perfect(real):
    figures = summarise(table(3 * real - 2, real))
    correlations = ("r3", "r3_within", "r2", "tip", "object")
    assert [figures[f"spearman_{name}"] for name in correlations] == [1.0] * 5
    assert figures["pairs_wrong"] == 0
    assert (figures["n_chunks"], figures["n_starts"], figures["n_object_chunks"]) == (30, 6, 30)
    assert figures["drift_per_step"] == [30.0, 28.0, 26.0]


def test_a_world_that_orders_the_other_way_round_is_all_wrong(real):
    figures = summarise(table(-real, real))
    assert figures["spearman_r3"] == figures["spearman_r3_within"] == -1.0
    assert figures["spearman_tip"] == figures["spearman_object"] == -1.0
    assert figures["pairs_wrong"] == 1.0


def test_pairs_are_counted_within_starts_only(real):
    imagined = np.concatenate([real[:5] - 10, real[5:]])  # one start far below all others
    figures = summarise(table(imagined, real))
    assert figures["pairs_wrong"] == 0
    assert figures["spearman_r3_within"] == 1.0
    assert figures["spearman_r3"] < 1.0


def test_pairs_wrong_counts_swapped_pairs(real):
    imagined = real.copy()
    order = np.argsort(real[:5])
    imagined[order[:2]] = real[order[1::-1]]  # swaps the two neighbours at the bottom
    assert summarise(table(imagined, real))["pairs_wrong"] == pytest.approx(1 / 60, abs=1e-4)


def test_objects_count_only_where_they_were_moved(real):
    columns = table(real, real)
    columns["object_displacement_m"] = np.where(np.arange(30) < 7, -real, 0.001)
    columns["imagined_r3"] = np.where(np.arange(30) < 7, real, -real)
    figures = summarise(columns)
    assert figures["n_object_chunks"] == 7
    assert figures["spearman_object"] == 1.0
    columns["object_displacement_m"][:] = 0
    assert math.isnan(summarise(columns)["spearman_object"])


# --- the whole, in a simulator that is none -----------------------------------------------------


class ToySimulator:
    """A grey picture whose brightness is where the first action has sent a point."""

    made = 0

    def __init__(self, suite, task_id, *, image_size, fast_rendering):
        ToySimulator.made += 1
        self.image_size = image_size

    def set_state(self, state, fixtures, gripper_command):
        assert fixtures == {}
        assert -1 <= gripper_command <= 1
        self.place = np.zeros(3)

    def step(self, action):
        self.place += 0.01 * action[:3]

    def render(self):
        level = 128 + 800 * np.linalg.norm(self.place)
        return np.full((*self.image_size, 3), min(level, 255), np.uint8)

    def proprio(self):
        return np.concatenate([self.place, np.zeros(5)]).astype(np.float32)

    def object_positions(self):
        return {"bowl": 0.5 * self.place, "plate": np.ones(3)}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """The tiny dataset with fixtures, and the toy simulator in this process."""
    episode = tiny.episode
    monkeypatch.setattr(
        tiny,
        "episode",
        lambda number, **kwargs: dataclasses.replace(
            episode(number, **kwargs),
            info=dataclasses.replace(episode(number, **kwargs).info, extra={"fixtures": {}}),
        ),
    )

    def run_here(starts, config, *, progress):
        (config.work / "real").mkdir(parents=True, exist_ok=True)
        for start in starts:
            module._run_for_real(start, config)

    monkeypatch.setattr(module, "Simulator", ToySimulator)
    monkeypatch.setattr(module, "run_for_real", run_here)
    module._simulator.cache_clear()
    yield tiny.write_dataset(tmp_path)
    module._simulator.cache_clear()


def config(data: Path, work: Path, **changes) -> AuditConfig:
    return AuditConfig(data=(data,), work=work, horizon=HORIZON, **{"starts": 4, **changes})


def test_starts_are_held_out_and_a_function_of_the_seed(data, tmp_path):
    dataset = LeRobotDataset(data)
    starts = audit_starts(config(data, tmp_path))
    assert len(starts) == 4
    for start in starts:
        assert dataset.episodes[start.episode_id].held_out
        recorded = dataset.read(start.episode_id, start.frame, start.frame + HORIZON).actions
        np.testing.assert_array_equal(start.actions[0], recorded)
    again, other = (audit_starts(config(data, tmp_path, seed=seed)) for seed in (0, 1))
    for one, two in zip(starts, again, strict=True):
        np.testing.assert_array_equal(one.actions, two.actions)
    places = [[(s.episode_id, s.frame) for s in group] for group in (starts, again, other)]
    assert places[0] == places[1] != places[2]


def test_nothing_to_audit_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="1 datasets, starts=0, horizon=4"):
        config(data, tmp_path, starts=0)
    with pytest.raises(ValueError, match="0 datasets"):
        AuditConfig(data=(), work=tmp_path)


def test_other_chunks_and_other_rendering_are_other_files(tmp_path):
    actions = np.zeros((2, 3, 7), np.float32)
    one = Start(tmp_path / "set", 1, 2, actions)
    configs = [config(tmp_path, tmp_path / "out", fast_rendering=fast) for fast in (True, False)]
    files = {one.file(c) for c in configs}
    files |= {dataclasses.replace(one, actions=actions + 0.1).file(c) for c in configs}
    files.add(dataclasses.replace(one, frame=3).file(configs[0]))
    assert len(files) == 5
    assert one.file(configs[0]) == Start(tmp_path / "set", 1, 2, actions.copy()).file(configs[0])
    assert {file.parent for file in files} == {tmp_path / "out" / "real"}


def test_an_audit_reports_every_chunk_and_goes_on_from_its_files(data, tmp_path):
    settings = config(data, tmp_path / "work")
    report = audit(tiny.world(), settings, progress=False)
    count = 4 * len(NOISE_SIZES)
    assert report["n_chunks"] == count
    assert report["n_starts"] == 4
    assert report["noise_sizes"] == list(NOISE_SIZES)
    assert len(report["drift_per_step"]) == HORIZON
    chunks = report["chunks"]
    assert {len(column) for column in chunks.values()} == {count}
    assert max(chunks["imagined_r3"] + chunks["imagined_r2"] + chunks["real_r3"]) <= 0
    assert json.loads(json.dumps(report)) == report

    files = sorted((tmp_path / "work" / "real").iterdir())
    assert len(files) == 4
    assert all(file.suffix == ".npz" for file in files)
    stamps = [file.stat().st_mtime_ns for file in files]
    assert audit(tiny.world(), settings, progress=False) == report
    assert [file.stat().st_mtime_ns for file in files] == stamps

    plot(report, tmp_path / "plots.png")
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "plots.png.part").exists()


def test_real_distances_and_displacements_are_those_of_the_simulator(data, tmp_path):
    settings = config(data, tmp_path / "work", starts=1)
    chunks = audit(tiny.world(), settings, progress=False)["chunks"]
    actions = audit_starts(settings)[0].actions.astype(np.float64)
    places = 0.01 * actions[..., :3].cumsum(1)
    off = np.linalg.norm(places[1:] - places[:1], axis=-1)
    np.testing.assert_allclose(chunks["tip_displacement_m"], off.mean(1), atol=1e-5)
    np.testing.assert_allclose(chunks["object_displacement_m"], 0.5 * off[:, -1], atol=1e-5)
    with np.load(next((tmp_path / "work" / "real").iterdir())) as stored:
        levels = np.minimum(128 + 800 * np.linalg.norm(places, axis=-1), 255).astype(np.uint8)
        assert (stored["frames"] == levels[..., None, None, None]).all()


def test_data_without_simulator_states_are_refused(data, tmp_path):
    from wmgym.data import subset

    bare = subset(data, tmp_path / "bare", [5], keep_sim_states=False)
    with pytest.raises(ValueError, match="stores no simulator states"):
        audit(tiny.world(), config(bare, tmp_path / "work"), progress=False)


def test_data_without_poses_of_fixtures_are_refused(data, tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"stores no poses of fixtures.*`wmgym record`"):
        audit(tiny.world(), config(tiny_dataset, tmp_path / "work"), progress=False)


@pytest.mark.parametrize("past", [1, 3])
def test_a_world_is_given_as_much_of_the_past_as_it_asks_for(past, data, tmp_path):
    world, given = tiny.world(), []
    start, world.context = world.start, past

    def watched(frames, proprio):
        given.append((frames, proprio))
        return start(frames, proprio)

    world.start = watched
    settings = config(data, tmp_path / "work", starts=2, seed=1)
    audit(world, settings, progress=False)
    assert [place.frame for place in audit_starts(settings)] == [8, 0]
    for place, (frames, proprio) in zip(audit_starts(settings), given, strict=True):
        episode = LeRobotDataset(data).read(place.episode_id)
        steps = np.arange(place.frame - past + 1, place.frame + 1).clip(0)
        assert frames.shape[:2] == proprio.shape[:2] == (len(place.actions), past)
        for row in range(len(place.actions)):
            images = (frames[row] * 255).round().byte().permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(images, episode.images[steps])
            np.testing.assert_array_equal(proprio[row], episode.proprio[steps])
