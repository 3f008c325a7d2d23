"""Training: it learns, it resumes to the same bits, it reads nothing that is held out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from train_tiny import STEPS, config

from wmgym.checkpoints import CheckpointError, read_config
from wmgym.data import FrameCache
from wmgym.distributed import Processes
from wmgym.log import Log
from wmgym.rewards.perceptual import LPIPS
from wmgym.run import update_average
from wmgym.training import warmup_cosine
from wmgym.worlds import train as module
from wmgym.worlds.batches import Windows, go_on
from wmgym.worlds.checkpoints import FAMILY, load_model, save_world
from wmgym.worlds.latent_world import LatentWorld
from wmgym.worlds.metrics import psnr
from wmgym.worlds.objective import LossWeights, Objective
from wmgym.worlds.train import TrainConfig, new_run, train, validate

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(config(tiny_dataset, out), progress=False) == out / "world"
    return out


def assert_equal_states(one, other, where: str = "") -> None:
    """Nested states of modules and optimizers, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_states(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_states(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_runs(one: Path, other: Path) -> None:
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other)]
    assert_equal_states(*states)
    worlds = [load_model(run / "world").state_dict() for run in (one, other)]
    assert_equal_states(*worlds)


def log(out: Path, group: str) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["group"] == group]


# --- what a run does ----------------------------------------------------------------------------


def test_a_run_leaves_world_checkpoint_scores_and_curves(finished):
    assert not list(finished.rglob("*.part"))
    described = read_config(finished / "world", "world", FAMILY)
    assert described["training"]["steps_done"] == STEPS
    assert described["training"]["data"]
    assert load_model(finished / "world").config == tiny.CONFIG
    assert [entry["step"] for entry in log(finished, "train")] == [1]
    scores = log(finished, "validation")
    assert [entry["step"] for entry in scores] == [6, 12]
    for entry in scores:
        figures = [entry[k] for k in ("psnr", "copy_psnr", "lpips", "copy_lpips")]
        assert all(math.isfinite(figure) for figure in figures)
    assert list(finished.glob("events.out.tfevents.*"))


def test_held_out_episodes_are_in_no_cache(finished):
    states = {
        name: {info.init_state_id for info in FrameCache.open(finished / "cache" / name).episodes}
        for name in ("train", "validation")
    }
    assert states == {"train": {0, 1, 2}, "validation": {25}}


def test_a_run_goes_on_with_the_same_settings_only(tiny_dataset, tmp_path, monkeypatch):
    train(config(tiny_dataset, tmp_path, steps=2, save_every=2), progress=False)
    changes = {"seed": 3, "learning_rate": 1e-4}
    for name, value in changes.items():
        with pytest.raises(CheckpointError, match=f"other settings: {name} was .* is {value}"):
            train(config(tiny_dataset, tmp_path, steps=2, **{name: value}), progress=False)
    train(config(tiny_dataset, tmp_path, steps=2, save_every=1, validate_every=1), progress=False)
    monkeypatch.setattr(module, "fingerprints", lambda data: ["of other data"])
    with pytest.raises(CheckpointError, match=r"data_fingerprints was .* is \['of other data'\]"):
        train(config(tiny_dataset, tmp_path, steps=2), progress=False)


def test_a_log_goes_on_where_the_run_does(tmp_path):
    with Log(tmp_path, 0, 400, ALONE, progress=False) as kept:
        for step in (100, 200, 300):
            kept.write(step, "train", {"loss": step / 100})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 350, "gro')
    with Log(tmp_path, 200, 400, ALONE, progress=False) as kept:
        kept.write(300, "train", {"loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(100, 1), (200, 2), (300, 7)]


def test_a_finished_run_is_not_trained_on(finished, tiny_dataset):
    before = (finished / "checkpoint.pt").read_bytes()
    train(config(tiny_dataset, finished), progress=False)
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_validation_scores_are_those_of_the_averaged_weights(finished, tiny_dataset):
    settings = config(tiny_dataset, finished)
    cache = FrameCache.open(finished / "cache" / "validation")
    windows = Windows(cache, tiny.HORIZON, 0, CPU)
    rows = np.linspace(0, len(windows.samplers[0]) - 1, settings.validation_windows).astype(
        np.int64
    )
    batch = windows.gather(rows, (tiny.HORIZON,))
    model, target = load_model(finished / "world").eval(), batch.targets[:, 0]
    with torch.no_grad():
        seen = model.tokenizer.look(batch.context)
        latents, proprio = model.dynamics(seen.coarse, batch.proprio, batch.actions)
        pose = model.dynamics.pose(batch.proprio[:, -1], proprio[:, -1])
        drawn = model.tokenizer.decode(latents[:, -1], pose, seen, batch.context).clamp(0, 1)
        expected = {
            "psnr": psnr(drawn, target),
            "copy_psnr": psnr(batch.context, target),
            "lpips": LPIPS()(drawn, target),
            "copy_lpips": LPIPS()(batch.context, target),
        }
    logged = log(finished, "validation")[-1]
    for name, values in expected.items():
        assert logged[name] == pytest.approx(values.mean().item(), abs=2e-4), name


def test_it_learns_a_few_windows_by_heart(tmp_path):
    data = tiny.write_dataset(tmp_path, length=tiny.HORIZON + 1)
    out = tmp_path / "run"
    settings = config(
        data, out, steps=80, warmup=10, learning_rate=0.01, ema=0.9, save_every=80, lead=0
    )
    train(settings, progress=False)
    cache = FrameCache.open(out / "cache" / "train")
    batch = Windows(cache, tiny.HORIZON, 99, CPU).batch(0, 6, ALONE)
    lpips = LPIPS()
    terms = []
    for model in (new_run(settings, cache, CPU).model, load_model(out / "world")):
        with torch.no_grad():
            terms.append(Objective(model, settings.loss, lpips, ALONE.mean)(batch)[1])
    before, after = terms
    assert after["imagined_l1"] < 0.7 * before["imagined_l1"]
    assert after["redrawn_l1"] < 0.5 * before["redrawn_l1"]
    assert after["imagined_lpips"] < 0.5 * before["imagined_lpips"]
    assert after["proprio"] < 0.8 * before["proprio"]
    assert after["latent"] < 0.1 * before["latent"]


def test_units_come_from_the_training_episodes(finished):
    cache = FrameCache.open(finished / "cache" / "train")
    episodes = np.split(np.asarray(cache.proprio), cache.starts[1:-1])
    dynamics = load_model(finished / "world").dynamics
    everything = np.concatenate(episodes)
    change = np.concatenate([np.diff(e, axis=0) for e in episodes])
    expected = {
        "proprio_mean": everything.mean(0),
        "proprio_std": everything.std(0, ddof=1),
        "change_std": change.std(0, ddof=1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(dynamics.get_buffer(name).numpy(), value, rtol=1e-4)


# --- interruptions ------------------------------------------------------------------------------


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(
    finished, tiny_dataset, tmp_path, monkeypatch
):
    step, calls = module._step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(tiny_dataset, tmp_path), progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()
    monkeypatch.setattr(module, "_step", step)
    train(config(tiny_dataset, tmp_path), progress=False)
    assert_same_runs(tmp_path, finished)
    assert log(tmp_path, "validation")[-1] == log(finished, "validation")[-1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "keys", "shape"])
def test_a_damaged_checkpoint_is_refused(damage, finished, tiny_dataset, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    content = (finished / "checkpoint.pt").read_bytes()
    if damage == "pickle":
        torch.save({"model": Path()}, checkpoint)
    elif damage == "keys":
        torch.save({"model": {}}, checkpoint)
    elif damage == "shape":
        run = torch.load(finished / "checkpoint.pt", weights_only=True)
        run["model"]["tokenizer.embed.bias"] = torch.zeros(5)
        torch.save(run, checkpoint)
    else:
        pieces = {"truncated": content[:-2000], "empty": b"", "text": b"not a checkpoint"}
        checkpoint.write_bytes(pieces[damage])
    with pytest.raises(CheckpointError, match=rf"{checkpoint} is damaged.*remove it") as error:
        train(config(tiny_dataset, tmp_path), progress=False)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


# --- where it starts from -----------------------------------------------------------------------


def test_init_from_takes_weights_units_and_shape(tiny_dataset, tmp_path):
    model = tiny.model(seed=5)
    model.dynamics.get_buffer("change_std").fill_(0.03)
    save_world(tmp_path / "before", model)
    settings = config(
        tiny_dataset,
        tmp_path / "run",
        world=TrainConfig(data=(tiny_dataset,), out=tmp_path).world,
        init_from=str(tmp_path / "before"),
        steps=1,
        learning_rate=1e-6,
    )
    after = load_model(train(settings, progress=False))
    assert after.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert torch.equal(after.dynamics.get_buffer("change_std"), torch.full((8,), 0.03))
    assert (
        read_config(tmp_path / "run" / "world", "world", FAMILY)["training"]["world"]["dynamics"][
            "horizon"
        ]
        == 4
    )


def test_an_unknown_world_to_start_from_leaves_nothing_behind(tiny_dataset, tmp_path):
    with pytest.raises(CheckpointError, match="no-such-world"):
        train(config(tiny_dataset, tmp_path / "run", init_from="no-such-world"), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_seed_decides_weights_and_windows(finished, tiny_dataset):
    cache = FrameCache.open(finished / "cache" / "train")
    runs = [new_run(config(tiny_dataset, finished, seed=s), cache, CPU) for s in (0, 0, 1)]
    states = [run.model.state_dict() for run in runs]
    assert_equal_states(states[0], states[1])
    assert_equal_states(states[0], runs[0].average.state_dict())
    assert not torch.equal(states[0]["tokenizer.slots"], states[2]["tokenizer.slots"])
    batches = [Windows(cache, 4, seed, CPU).batch(3, 4, ALONE) for seed in (0, 0, 1)]
    assert torch.equal(batches[0].targets, batches[1].targets)
    assert not torch.equal(batches[0].actions, batches[2].actions)


def test_shares_of_a_batch_make_up_the_batch(finished):
    windows = Windows(FrameCache.open(finished / "cache" / "train"), 4, 0, CPU)
    whole = windows.batch(7, 6, ALONE)
    shares = [windows.batch(7, 6, Processes(rank, 3, CPU)) for rank in range(3)]
    for rank, share in enumerate(shares):
        assert share.offsets == whole.offsets
        for name in ("context", "targets", "proprio", "future_proprio", "lead", "actions"):
            assert torch.equal(getattr(share, name), getattr(whole, name)[rank::3])
    with pytest.raises(ValueError, match="batch_size=6 is not a multiple of the 4 processes"):
        windows.batch(0, 6, Processes(0, 4, CPU))


def test_a_lead_is_imagined_before_the_window(finished):
    """A batch with a lead goes on where the world, rolled out over the lead, has got to."""
    cache = FrameCache.open(finished / "cache" / "train")
    windows = Windows(cache, tiny.HORIZON, 0, CPU, 1)
    model = tiny.model()
    recorded = windows.gather(np.array([0, 2, 5, 7]), (1, 3), lead=1)
    batch = go_on(model, recorded)
    world = LatentWorld(model, name="tiny")
    state = world.start(recorded.context[:, None].repeat(1, 2, 1, 1, 1), recorded.proprio)
    _, imagined = world.step(state, recorded.lead)
    torch.testing.assert_close(batch.context, imagined.frames[:, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.proprio, imagined.proprio[:, -2:], atol=1e-5, rtol=0)
    assert not torch.equal(batch.context, recorded.context)
    steps = windows.samplers[1]._steps[[0, 2, 5, 7]] + tiny.HORIZON
    assert np.array_equal(batch.actions[:, 0].numpy(), cache.actions[steps])
    assert np.array_equal(batch.future_proprio[:, 0].numpy(), cache.proprio[steps + 1])
    shown = batch.targets.permute(0, 1, 3, 4, 2).mul(255).round().to(torch.uint8).numpy()
    assert np.array_equal(shown, np.asarray(cache.frames[steps[:, None] + [1, 3]]))


def test_without_a_lead_nothing_is_imagined(finished):
    windows = Windows(FrameCache.open(finished / "cache" / "train"), tiny.HORIZON, 0, CPU, 1)
    batch = windows.batch(0, 4, ALONE)
    assert go_on(tiny.model(), batch).context is batch.context
    lengths = {windows.batch(step, 4, ALONE, lead=1).lead.shape[1] for step in range(20)}
    assert lengths == {0, tiny.HORIZON}


def test_a_lead_longer_than_the_episodes_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"lead=9 with chunks of 4 steps.*longest episode"):
        train(config(tiny_dataset, tmp_path, lead=9), progress=False)
    with pytest.raises(ValueError, match="lead=-1: allowed"):
        config(tiny_dataset, tmp_path, lead=-1)


# --- the pieces ---------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_to_two_per_cent():
    rates = [warmup_cosine(step, 100, 1.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[55] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)
    assert (np.diff(rates[10:]) < 0).all()


def test_the_average_moves_by_its_decay_and_copies_buffers():
    average, model = tiny.model(seed=0), tiny.model(seed=1)
    model.dynamics.get_buffer("proprio_mean").fill_(2.0)
    before = {name: p.detach().clone() for name, p in average.named_parameters()}
    update_average(average, model, 0.75)
    for name, weight in model.named_parameters():
        expected = 0.75 * before[name] + 0.25 * weight
        torch.testing.assert_close(average.get_parameter(name), expected, atol=1e-6, rtol=1e-5)
    assert (average.dynamics.get_buffer("proprio_mean") == 2).all()


def test_pixels_that_move_weigh_more(finished):
    batch = Windows(FrameCache.open(finished / "cache" / "train"), 4, 0, CPU).batch(0, 3, ALONE)
    objective = Objective(tiny.model(), LossWeights(motion=10), LPIPS(), ALONE.mean)
    context = torch.zeros(1, 3, 16, 16)
    target = context.clone()
    target[..., 4:8, 4:8] = 1
    still, moving = torch.zeros_like(target), torch.zeros_like(target)
    still[..., 12:14, 12:14] = 0.5
    moving[..., 5:7, 5:7] = 0.5
    errors = [objective._pixels(target + e, target, context).item() for e in (still, moving)]
    assert errors[1] > 4 * errors[0] > 0
    flat = Objective(tiny.model(), LossWeights(motion=0), LPIPS(), ALONE.mean)
    assert flat._pixels(target + still, target, context).item() == pytest.approx(
        still.mean().item()
    )
    loss, terms = objective(batch)
    weights = objective.weights
    assert loss.item() == pytest.approx(
        sum(terms[k].item() for k in ("imagined_l1", "redrawn_l1"))
        + weights.lpips * (terms["imagined_lpips"] + terms["redrawn_lpips"]).item()
        + weights.latent * terms["latent"].item()
        + weights.proprio * terms["proprio"].item(),
        rel=1e-5,
    )
    loss.backward()
    without = [n for n, p in objective.model.named_parameters() if p.grad is None]
    assert without == []


def test_validation_does_not_change_the_model(finished, tiny_dataset):
    model = load_model(finished / "world")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = Windows(FrameCache.open(finished / "cache" / "validation"), 4, 0, CPU, 1)
    settings = config(tiny_dataset, finished)
    scores = [validate(model, windows, LPIPS(), settings) for _ in range(2)]
    assert scores[0] == scores[1]
    assert_equal_states(before, model.state_dict())


# --- bad input ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_dataset, tmp_path):
    settings = config(tiny_dataset, tmp_path, learning_rate=1e30, warmup=0, steps=9, save_every=9)
    with pytest.raises(FloatingPointError, match=r"of step \d+ is (nan|inf); lower learning_rate"):
        train(settings, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0: must be >= 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"validation_windows": 0}, "validation_windows=0: must be >= 1"),
        ({"warmup": -1}, "warmup=-1: must be >= 0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: must be > 0"),
        ({"ema": 2.0}, r"ema=2\.0: must be < 1"),
        ({"validation_states": (25, 41)}, r"\[41\]"),
    ],
)
def test_config_refuses_nonsense(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        config(tmp_path, tmp_path, **changes)


def test_no_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data is empty"):
        TrainConfig(data=(), out=tmp_path)


@pytest.mark.parametrize(("states", "missing"), [((7,), "validation"), ((0, 1, 2, 25), "train")])
def test_data_without_episodes_for_a_part_are_refused(states, missing, tiny_dataset, tmp_path):
    settings = config(tiny_dataset, tmp_path, validation_states=states)
    with pytest.raises(ValueError, match=f"no episode for {missing}"):
        train(settings, progress=False)


def test_episodes_shorter_than_the_horizon_are_refused(tmp_path):
    data = tiny.write_dataset(tmp_path, length=tiny.HORIZON)
    with pytest.raises(ValueError, match="horizon=4, but the longest episode has 4 steps"):
        train(config(data, tmp_path / "run"), progress=False)
