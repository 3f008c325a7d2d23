"""Recording: the list of takes, the noise, labels, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents
from programs import kill_when, run
from tqdm import tqdm

from wmgym.data import LeRobotDataset
from wmgym.data.lerobot_writer import staged_names
from wmgym.experts import recorder
from wmgym.experts.recorder import ActionNoise, RecordConfig, Take, record, takes
from wmgym.workers import in_workers

SUITE = "libero_object"
LIMIT = 12
"""Steps of an episode in `record_short.py`."""


def config(out: Path = Path("out"), **changes) -> RecordConfig:
    values = {"tasks": (0, 3), "episodes": 2, "held_out": 1, "misses": 1, "attempts": 3}
    return RecordConfig(SUITE, out, **{**values, "image_size": 32, **changes})


# --- the list of takes --------------------------------------------------------------------------


def test_takes_are_a_fixed_list_with_unique_names():
    chosen = takes(config(episodes=45, held_out=3, misses=2))
    assert chosen == takes(config(episodes=45, held_out=3, misses=2))
    assert len({take.name for take in chosen}) == len(chosen) == 2 * 50
    assert [take.task_id for take in chosen] == [0] * 50 + [3] * 50


def test_held_out_initial_states_are_used_by_held_out_takes_only():
    for take in takes(config(episodes=90, held_out=10, misses=50)):
        assert (take.init_state_id in range(40, 50)) == (take.kind == "held-out")
        assert take.init_state_id in range(50)
    training = [t for t in takes(config(tasks=(7,), episodes=45)) if t.kind == "train"]
    assert [take.init_state_id for take in training] == [*range(40), *range(5)]


def test_more_takes_begin_with_the_same_ones():
    few, many = takes(config(episodes=2)), takes(config(episodes=7, held_out=5))
    assert set(few) < set(many)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"suite": "kitchen"}, "suite='kitchen'"),
        ({"held_out": 11}, "held_out=11"),
        ({"held_out": -1}, "held_out=-1"),
        ({"episodes": -1}, "episodes"),
        ({"misses": -1}, "misses"),
        ({"attempts": 0}, "attempts"),
        ({"workers": 0}, "workers"),
    ],
)
def test_config_refuses_nonsense(changes, named):
    with pytest.raises(ValueError, match=named):
        RecordConfig(**{"suite": SUITE, "out": Path("out"), **changes})


# --- noise --------------------------------------------------------------------------------------

MEANT = np.array([0.2, -0.1, 0.3, 0.05, 0, 0, 1], np.float32)


def disturbed(count, phase="transit", level=0.1, burst_rate=0.0, seed=0, action=MEANT):
    noise = ActionNoise(np.random.default_rng(seed), level, burst_rate)
    return np.stack([noise(action, phase) for _ in range(count)])


def test_noise_is_a_function_of_its_generator_and_stays_in_range():
    one = disturbed(500, level=1.0, burst_rate=0.1)
    assert one.dtype == np.float32
    assert np.abs(one).max() <= 1
    np.testing.assert_array_equal(one, disturbed(500, level=1.0, burst_rate=0.1))
    assert not np.array_equal(one, disturbed(500, level=1.0, burst_rate=0.1, seed=1))


def test_without_noise_nothing_is_disturbed():
    np.testing.assert_array_equal(disturbed(50, level=0.0), np.tile(MEANT, (50, 1)))
    np.testing.assert_array_equal(
        disturbed(1, level=0.0, action=3 * MEANT)[0], np.clip(3 * MEANT, -1, 1)
    )


def test_noise_has_the_size_and_memory_it_says():
    walk = disturbed(20_000, level=0.03)[:, :6] - MEANT[:6]
    expected = 0.03 / np.sqrt(1 - 0.85**2) * np.array([1, 1, 1, 0.3, 0.3, 0.3])
    np.testing.assert_allclose(walk.std(0), expected, rtol=0.1)
    for column in walk.T:
        assert np.corrcoef(column[1:], column[:-1])[0, 1] == pytest.approx(0.85, abs=0.02)


def test_noise_leaves_the_gripper_alone():
    assert (disturbed(500, level=0.5)[:, 6] == MEANT[6]).all()


@pytest.mark.parametrize("phase", ["approach", "grasp", "place", "release", "work"])
def test_close_to_contact_noise_is_smaller_and_no_burst_begins(phase):
    free, careful = (disturbed(8000, p, level=0.05) for p in ("transit", phase))
    ratio = careful[:, :6].std(0) / free[:, :6].std(0)
    np.testing.assert_allclose(ratio, 0.4, rtol=0.15)
    bursting = disturbed(8000, phase, level=0.05, burst_rate=1.0)
    np.testing.assert_array_equal(bursting, careful)


def test_bursts_are_steady_motions_of_a_few_steps_that_mostly_keep_the_gripper():
    actions = disturbed(30_000, level=0.0, burst_rate=0.02)
    inside = (actions[:, :6] != MEANT[:6]).any(1)
    starts = np.flatnonzero(inside & (np.r_[True, (np.diff(actions[:, 0]) != 0)]))
    lengths, kept = [], []
    for start in starts:
        stop = start
        while stop < len(actions) and np.array_equal(actions[stop], actions[start]):
            stop += 1
        lengths.append(stop - start)
        kept.append(actions[start, 6] == MEANT[6])
    assert 300 < len(lengths) < 800
    assert set(lengths) <= set(range(3, 10))
    assert 0.84 < np.mean(kept) < 0.96  # of a fifth that are random, half agree by chance
    assert set(np.unique(actions[:, 6])) == {-1.0, 1.0}


# --- a simulator that is none -------------------------------------------------------------------


class ToySimulator:
    """A point that moves as it is told; the task is to send it beyond 0.25."""

    instruction = "push the point"
    renders = 0

    def __init__(self, suite, task_id, *, image_size, fast_rendering):
        self.image_size = image_size

    def reset(self, state, *, seed):
        self.place = np.zeros(3) + 0.001 * state[0]

    def step(self, action):
        self.place = self.place + 0.1 * np.asarray(action[:3], float)

    def state(self):
        return np.array([*self.place, 0.0])

    def set_state(self, state):
        self.place = state[:3].copy()

    def proprio(self):
        return np.array([*self.place, 0, 0, 0, 0, 0], np.float32)

    def fixtures(self):
        return {"table": [0.0] * 7}

    def render(self, camera="agentview"):
        ToySimulator.renders += 1
        level = np.clip(128 + 100 * self.place[0] + 30 * (camera == "wrist"), 0, 255)
        return np.full((*self.image_size, 3), level, np.uint8)

    @property
    def control_env(self):
        return self

    @property
    def success(self):
        return bool(self.place[0] > 0.25)


class ToyExpert:
    """Pushes for six steps; in the wrong direction if it shall miss, or by bad luck."""

    phase = "transit"

    def __init__(self, env, rng, expert_config):
        lucky = rng.random() < 0.6
        misses = expert_config.give_up
        assert misses == (expert_config.grasp_offset != (0.0, 0.0))
        push = 0.8 if lucky and not misses else -0.8
        self.actions = [np.array([push, 0, 0, 0, 0, 0, -1], np.float32)] * 6

    def __iter__(self):
        return iter(self.actions)


class HereAndNow:
    """Workers in this process, which can be interrupted after a few jobs."""

    patience = 10**6
    jobs: list[Take] = []  # noqa: RUF012

    @staticmethod
    def run(function, jobs, workers, group):
        for job in jobs:
            if len(HereAndNow.jobs) >= HereAndNow.patience:
                raise KeyboardInterrupt
            HereAndNow.jobs.append(job)
            yield function(job)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(recorder, "Simulator", ToySimulator)
    monkeypatch.setattr(recorder, "Expert", ToyExpert)
    monkeypatch.setattr(recorder, "initial_states", lambda suite, task: np.arange(50.0)[:, None])
    monkeypatch.setattr(recorder, "in_workers", HereAndNow.run)
    monkeypatch.setattr(HereAndNow, "jobs", [])
    monkeypatch.setattr(ToySimulator, "renders", 0)
    recorder._simulator.cache_clear()
    yield
    recorder._simulator.cache_clear()


def test_a_recording_has_its_takes_in_order_and_labelled(toy, tmp_path):
    settings = config(tmp_path / "set", episodes=6, attempts=2)
    assert record(settings, progress=False) == tmp_path / "set"
    dataset, chosen = LeRobotDataset(tmp_path / "set"), takes(settings)
    assert len(dataset.episodes) == len(chosen) == 16
    for info, take in zip(dataset.episodes, chosen, strict=True):
        assert (info.task_id, info.init_state_id) == (take.task_id, take.init_state_id)
        assert info.extra["kind"] == take.kind
        assert info.extra["fixtures"] == {"table": [0.0] * 7}
        assert info.instruction == "push the point"
        assert info.held_out == (take.kind == "held-out")
        if take.kind == "miss":
            assert not info.success
        elif not info.success:
            assert info.extra["attempt"] == settings.attempts - 1
    outcomes = [info.success for info in dataset.episodes if info.extra["kind"] != "miss"]
    attempts = {info.extra["attempt"] for info in dataset.episodes}
    assert True in outcomes
    assert False in outcomes
    assert attempts == {0, 1}
    assert dataset.meta["wmgym"]["config"]["episodes"] == 6


def test_what_is_stored_is_what_happened_and_only_that_is_rendered(toy, tmp_path):
    record(config(tmp_path / "set"), progress=False)
    dataset = LeRobotDataset(tmp_path / "set")
    differs = False
    for info in dataset.episodes:
        episode = dataset.read(info.episode_id, wrist=True)
        places = episode.sim_states[:, :3]
        executed = np.diff(places, axis=0) / 0.1
        np.testing.assert_allclose(executed, episode.actions[:-1, :3], atol=1e-5)
        np.testing.assert_allclose(episode.proprio[:, :3], places, atol=1e-6)
        assert (np.abs(episode.clean_actions[:, 0]) == np.float32(0.8)).all()
        differs |= not np.array_equal(episode.clean_actions, episode.actions)
        for images, offset in ((episode.images, 128), (episode.wrist_images, 158)):
            shown = images.mean((1, 2, 3))
            np.testing.assert_allclose(shown, offset + 100 * places[:, 0], atol=4)
    assert differs
    assert ToySimulator.renders == 2 * sum(info.length for info in dataset.episodes)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_recording_ends_in_the_same_dataset(after, toy, tmp_path, monkeypatch):
    whole, parts = config(tmp_path / "whole" / "set"), config(tmp_path / "parts" / "set")
    record(whole, progress=False)
    HereAndNow.jobs.clear()
    monkeypatch.setattr(HereAndNow, "patience", after)
    with pytest.raises(KeyboardInterrupt):
        record(parts, progress=False)
    assert not parts.out.exists()
    staging = tmp_path / "parts" / "set.staging"
    (staging / "task03-train-001.part").mkdir(parents=True, exist_ok=True)
    (staging / "task03-train-001.part" / "info.json").write_text("{")
    monkeypatch.setattr(HereAndNow, "patience", 10**6)
    record(parts, progress=False)
    assert sorted(t.name for t in HereAndNow.jobs) == sorted(t.name for t in takes(parts))
    assert contents(parts.out) == contents(whole.out)


def test_the_seed_decides_everything(toy, tmp_path):
    folders = []
    for name, seed in (("a/set", 0), ("b/set", 0), ("c/set", 1)):
        folders.append(record(config(tmp_path / name, seed=seed), progress=False))
    assert contents(folders[0]) == contents(folders[1]) != contents(folders[2])


def test_a_take_does_not_depend_on_what_else_is_recorded(toy, tmp_path):
    few = LeRobotDataset(record(config(tmp_path / "few"), progress=False))
    one = LeRobotDataset(record(config(tmp_path / "one", tasks=(3,)), progress=False))
    offset = len(few.episodes) // 2
    for info in one.episodes:
        same = few.read(info.episode_id + offset)
        np.testing.assert_array_equal(one.read(info.episode_id).actions, same.actions)
        assert info.seed == same.info.seed


def test_a_dataset_is_never_overwritten(toy, tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="remove it or choose another folder"):
        record(config(tmp_path / "set"), progress=False)
    assert HereAndNow.jobs == []


# --- what is staged belongs to one configuration -------------------------------------------------


def interrupted(settings: RecordConfig, monkeypatch, after: int = 3) -> Path:
    """The staging area of a recording that was interrupted after some takes."""
    with monkeypatch.context() as patch:
        patch.setattr(HereAndNow, "patience", after)
        with pytest.raises(KeyboardInterrupt):
            record(settings, progress=False)
    HereAndNow.jobs.clear()
    return settings.out.with_name(settings.out.name + ".staging")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"burst_rate": 0.5},
        {"fast_rendering": False},
        {"image_size": 64},
        {"attempts": 1, "seed": 2},
    ],
)
def test_takes_of_another_configuration_are_refused(changes, toy, tmp_path, monkeypatch):
    settings = config(tmp_path / "set")
    interrupted(settings, monkeypatch)
    with pytest.raises(ValueError, match=r"set\.staging holds takes recorded with") as refusal:
        record(dataclasses.replace(settings, **changes), progress=False)
    for name, value in changes.items():
        assert f"{name}={getattr(settings, name)!r} (now {value!r})" in str(refusal.value)
    assert str(refusal.value).count("now") == len(changes)
    assert HereAndNow.jobs == []
    record(settings, progress=False)


def test_a_staging_area_without_takes_belongs_to_nobody(toy, tmp_path, monkeypatch):
    interrupted(config(tmp_path / "set"), monkeypatch, after=0)
    record(config(tmp_path / "set", seed=1), progress=False)


def test_takes_may_be_added_with_any_number_of_workers(toy, tmp_path, monkeypatch):
    whole = config(tmp_path / "whole" / "set", episodes=4, workers=1)
    parts = config(tmp_path / "parts" / "set", episodes=2, tasks=(3,), workers=2)
    interrupted(parts, monkeypatch)
    record(whole, progress=False)
    record(dataclasses.replace(whole, out=parts.out, workers=3), progress=False)
    assert contents(parts.out) == contents(whole.out)


def test_progress_counts_the_takes_of_this_recording_only(toy, tmp_path, monkeypatch):
    many = config(tmp_path / "set", episodes=6)
    interrupted(many, monkeypatch, after=5)
    bars = []

    def bar(**options):
        bars.append(options)
        return tqdm(**options)

    monkeypatch.setattr(recorder, "tqdm", bar)
    record(dataclasses.replace(many, episodes=2), progress=False)
    assert (bars[0]["initial"], bars[0]["total"]) == (2, 8)


def test_takes_of_unknown_configuration_are_refused_until_it_is_written_down(
    toy, tmp_path, monkeypatch
):
    settings = config(tmp_path / "set")
    staging = interrupted(settings, monkeypatch)
    (staging / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json that says how") as refusal:
        record(settings, progress=False)
    assert HereAndNow.jobs == []
    (staging / "config.json").write_text(re.search(r"\{.*\}", str(refusal.value))[0])
    record(settings, progress=False)
    assert len(HereAndNow.jobs) == len(takes(settings)) - 3


# --- in processes -------------------------------------------------------------------------------


def stage_slowly(settings: RecordConfig, take: Take) -> bool:
    settings.out.with_name(take.name).touch()
    time.sleep(0.5)
    return True


def fail_first(settings: RecordConfig, take: Take) -> bool:
    if take == takes(settings)[0]:
        raise RuntimeError("the arm fell off")
    return stage_slowly(settings, take)


def interrupt_first(settings: RecordConfig, take: Take) -> bool:
    if take == takes(settings)[0]:
        os.kill(os.getppid(), signal.SIGINT)
    return stage_slowly(settings, take)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: programs that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("stage", "error"), [(fail_first, RuntimeError), (interrupt_first, KeyboardInterrupt)]
)
def test_an_error_and_ctrl_c_stop_a_recording_at_once(stage, error, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "_stage", stage)
    settings = config(tmp_path / "set", episodes=10)
    with pytest.raises(error):
        record(settings, progress=False)
    assert len(list(tmp_path.glob("task*"))) < len(takes(settings)) // 2


def threads(_: int) -> tuple[int, str, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["LP_NUM_THREADS"]


def test_workers_have_one_thread_and_this_process_keeps_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    assert list(in_workers(threads, [0], 1)) == [(1, "1", "0")]
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "LP_NUM_THREADS" not in os.environ


# --- in LIBERO ----------------------------------------------------------------------------------


@pytest.mark.libero
def test_a_killed_recording_in_libero_ends_in_the_same_dataset(tmp_path):
    pytest.importorskip("libero", reason="needs the extra `libero`")
    program = [sys.executable, Path(__file__).with_name("record_short.py")]
    whole, parts = tmp_path / "whole" / "set", tmp_path / "parts" / "set"
    run([*program, whole])
    staging = parts.with_name("set.staging")
    kill_when([*program, parts], lambda: bool(staged_names(staging)))
    assert not parts.exists()
    run([*program, parts])
    assert contents(parts) == contents(whole)

    dataset = LeRobotDataset(whole)
    assert [info.init_state_id for info in dataset.episodes] == [0, 40]
    for info in dataset.episodes:
        episode = dataset.read(info.episode_id, wrist=True)
        assert info.length == LIMIT
        assert not info.success
        assert info.instruction
        assert episode.images.shape == episode.wrist_images.shape == (LIMIT, 64, 64, 3)
        assert episode.images.std() > 10
        assert np.isfinite(episode.sim_states).all()
        assert np.abs(episode.actions).max() <= 1
        assert (np.diff(episode.sim_states[:, 0]) > 0).all()
