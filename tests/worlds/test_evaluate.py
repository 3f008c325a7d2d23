"""Scores of worlds whose predictions are known, against figures computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from skimage.metrics import structural_similarity

from wmgym.data import LeRobotDataset
from wmgym.data.episodes import SPLITS
from wmgym.rewards.perceptual import LPIPS
from wmgym.worlds.evaluate import MAX_PSNR, METRICS, evaluate, read_windows, split_starts
from wmgym.worlds.world import Prediction

HORIZON = 3
HELD_OUT = (5, 6)


class Copier:
    """Imagines that no picture changes and the arm is at the origin; redraws perfectly."""

    device = torch.device("cpu")
    image_size = (tiny.SIZE, tiny.SIZE)

    def __init__(self, context=2):
        self.context = context

    def start(self, frames, proprio):
        assert frames.shape[1] == proprio.shape[1] == self.context
        return frames[:, -1:]

    def step(self, frame, actions):
        batch, steps, _ = actions.shape
        frames = frame.expand(-1, steps, -1, -1, -1)
        return frame, Prediction(frames, torch.zeros(batch, steps, 8))

    def redraw(self, context, frames, proprio):
        assert proprio.shape[1] == 1 + frames.shape[1]
        return frames


@pytest.fixture(scope="module")
def dataset(tiny_dataset) -> LeRobotDataset:
    return LeRobotDataset(tiny_dataset)


@pytest.fixture(scope="module")
def report(tiny_dataset):
    return evaluate(Copier(), [tiny_dataset], windows=1000, horizon=HORIZON, progress=False)


def all_windows(dataset) -> list[tuple[int, int]]:
    return [(e, t) for e in HELD_OUT for t in range(tiny.LENGTH - HORIZON)]


def direct(dataset) -> dict[str, np.ndarray]:
    """Figures `(W, T)` of copying the context frame, window by window."""
    lpips, rows = LPIPS(), {name: [] for name in METRICS}
    for episode, t in all_windows(dataset):
        images = dataset.read(episode).images.astype(np.float64) / 255
        context, future = images[t], images[t + 1 : t + 1 + HORIZON]
        errors = ((future - context) ** 2).mean((1, 2, 3))
        rows["mse"].append(errors)
        psnr = [-10 * math.log10(e) if e else math.inf for e in errors]
        rows["psnr"].append(np.minimum(psnr, MAX_PSNR))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        rows["ssim"].append(
            [
                structural_similarity(f, context, data_range=1, channel_axis=-1, **options)
                for f in future
            ]
        )
        x, y = (torch.from_numpy(i).float().permute(0, 3, 1, 2) for i in (future, context[None]))
        rows["lpips"].append([lpips(f[None], y).item() for f in x])
    return {name: np.array(values) for name, values in rows.items()}


def test_copying_scores_what_a_direct_computation_gives(report, dataset):
    for name, values in direct(dataset).items():
        tolerance = 1e-3 if name == "psnr" else 5e-5
        assert report[f"copy_{name}"] == pytest.approx(values.mean(), abs=tolerance), name
        assert report["per_step"][f"copy_{name}"] == pytest.approx(values.mean(0), abs=tolerance)
    assert report["copy_mse"] > 0


def test_a_world_that_copies_scores_as_copying(report):
    for name in METRICS:
        assert report[name] == report[f"copy_{name}"]
        assert report["per_step"][name] == report["per_step"][f"copy_{name}"]


def test_equal_pictures_score_best_and_finitely(report):
    expected = {"mse": 0.0, "psnr": MAX_PSNR, "ssim": 1.0, "lpips": 0.0}
    for name, value in expected.items():
        assert report[f"tokenizer_{name}"] == pytest.approx(value, abs=1e-5)


def test_the_arms_error_is_in_millimetres(report, dataset):
    windows = all_windows(dataset)
    places = [dataset.read(e).proprio[t + 1 : t + 1 + HORIZON, :3] for e, t in windows]
    expected = 1000 * np.linalg.norm(places, axis=-1)
    assert report["position_error_mm"] == pytest.approx(expected.mean(), rel=1e-4)
    assert report["per_step"]["position_error_mm"] == pytest.approx(expected.mean(0), rel=1e-4)


def test_means_are_those_of_the_steps_and_of_the_datasets(report, tiny_dataset, tmp_path):
    for name, value in report["per_step"].items():
        assert len(value) == HORIZON
        assert report[name] == pytest.approx(np.mean(value), rel=1e-5, abs=2e-5)
    assert report["datasets"]["tiny"]["windows"] == len(HELD_OUT) * (tiny.LENGTH - HORIZON)
    assert report["datasets"]["tiny"]["psnr"] == report["psnr"]
    other = tiny.write_dataset(tmp_path, length=6).rename(tmp_path / "short")
    both = evaluate(Copier(), [tiny_dataset, other], horizon=HORIZON, progress=False)
    counts = {name: part["windows"] for name, part in both["datasets"].items()}
    assert counts == {"tiny": 22, "short": 6}
    weighted = sum(part["mse"] * part["windows"] for part in both["datasets"].values()) / 28
    assert both["mse"] == pytest.approx(weighted, abs=2e-5)


@pytest.mark.parametrize("context", [1, 4])
def test_a_world_is_given_as_much_of_the_past_as_it_asks_for(context, report, tiny_dataset):
    world = Copier(context)
    scores = evaluate(world, [tiny_dataset], windows=1000, horizon=HORIZON, progress=False)
    assert scores == report


def test_a_real_world_is_scored_and_the_seed_chooses_the_windows(tiny_dataset):
    world = tiny.world()
    reports = [
        evaluate(world, [tiny_dataset], windows=5, horizon=HORIZON, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1]
    assert reports[0]["copy_mse"] != reports[2]["copy_mse"]
    assert reports[0]["datasets"]["tiny"]["windows"] == 5
    assert reports[0]["mse"] not in (reports[0]["copy_mse"], reports[0]["tokenizer_mse"])
    figures = [reports[0][p + m] for p in ("", "copy_", "tokenizer_") for m in METRICS]
    assert np.isfinite(figures).all()


# --- windows ------------------------------------------------------------------------------------


def test_starts_are_held_out_distinct_and_leave_room(dataset):
    everything = split_starts(dataset, HORIZON, 1000, seed=0)
    assert everything == all_windows(dataset)
    some = split_starts(dataset, HORIZON, 9, seed=1)
    assert some == sorted(set(some))
    assert len(some) == 9
    assert set(some) < set(everything)
    assert some == split_starts(dataset, HORIZON, 9, seed=1)
    assert some != split_starts(dataset, HORIZON, 9, seed=2)
    assert split_starts(dataset, tiny.LENGTH - 1, 1000, seed=0) == [(5, 0), (6, 0)]
    with pytest.raises(
        ValueError, match=f"no episode longer than {tiny.LENGTH} steps in split=.held_out"
    ):
        split_starts(dataset, tiny.LENGTH, 1, seed=0)


def test_windows_are_of_the_split_that_is_asked_for(tiny_dataset):
    dataset = LeRobotDataset(tiny_dataset)
    of = {
        split: {episode for episode, _ in split_starts(dataset, HORIZON, 1000, 0, split)}
        for split in SPLITS
    }
    assert of["train"]
    assert of["train"].isdisjoint(of["held_out"])
    assert of["all"] == of["train"] | of["held_out"]
    with pytest.raises(ValueError, match="split='test': allowed are"):
        split_starts(dataset, HORIZON, 1, 0, "test")

    def score(**split):
        return evaluate(
            tiny.world(), [tiny_dataset], windows=5, horizon=HORIZON, progress=False, **split
        )

    assert score() == score(split="held_out") != score(split="train")


@pytest.mark.parametrize("context", [1, 2, 4])
def test_windows_hold_what_was_recorded(context, dataset):
    places = [(5, 0), (6, 1), (5, tiny.LENGTH - HORIZON - 1)]
    size = (tiny.SIZE, tiny.SIZE)
    frames, proprio, actions = read_windows(
        dataset, places, HORIZON, context=context, image_size=size
    )
    assert frames.shape == (3, context + HORIZON, 3, tiny.SIZE, tiny.SIZE)
    for row, (episode_id, t) in enumerate(places):
        episode = dataset.read(episode_id)
        images = (frames[row] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        steps = np.arange(t - context + 1, t + HORIZON + 1).clip(0)
        np.testing.assert_array_equal(images, episode.images[steps])
        np.testing.assert_array_equal(proprio[row], episode.proprio[steps])
        np.testing.assert_array_equal(actions[row], episode.actions[t : t + HORIZON])
    halved, _, _ = read_windows(dataset, places, HORIZON, context=context, image_size=(16, 16))
    assert halved.shape == (3, context + HORIZON, 3, 16, 16)
    assert (halved.mean() - frames.mean()).abs() < 0.01


def test_nothing_to_score_is_refused(dataset):
    for folders, windows in (([], 5), ([dataset.root], 0)):
        with pytest.raises(ValueError, match=f"{len(folders)} datasets, windows={windows}: name"):
            evaluate(tiny.world(), folders, windows=windows, progress=False)
