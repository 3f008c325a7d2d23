"""Training of the published dynamics: it learns, it resumes, it leaves a world."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from published_train_tiny import (
    DYNAMICS,
    STEPS,
    TOKENIZER,
    dynamics_training,
    interrupted,
    random_tokenizer,
)

from wmgym.checkpoints import CheckpointError
from wmgym.data import FrameCache
from wmgym.worlds import load_token_world
from wmgym.worlds.tokens import train_dynamics as module
from wmgym.worlds.tokens.action_tokens import PUBLISHED_RANGES, ActionTokens
from wmgym.worlds.tokens.clips import Clips
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.objective import accuracy, predictions
from wmgym.worlds.tokens.train_dynamics import (
    PRESETS,
    DynamicsTraining,
    fit_actions,
    train_dynamics,
)
from wmgym.worlds.tokens.transformer import TokenDynamics
from wmgym.worlds.tokens.window_tokens import WindowTokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return random_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dynamics"
    config = dynamics_training(tiny_dataset, out, tokenizer)
    assert train_dynamics(config, progress=False) == out / "world"
    return out


def log(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


# --- what a run does ----------------------------------------------------------------------------


def test_a_run_leaves_a_world_that_can_be_loaded(finished):
    assert not list(finished.rglob("*.part"))
    world = load_token_world(finished / "world", horizon=2, memory_gib=0.01)
    frames, proprio, actions = tiny.rows(1, 2)
    _, seen = world.step(world.start(frames, proprio), actions)
    assert seen.frames.shape == (1, 2, 3, 32, 32)
    notes = json.loads((finished / "world" / "training.json").read_text())
    assert notes["steps_done"] == STEPS
    assert notes["action_space"] == "raw"
    average = torch.load(finished / "checkpoint.pt", weights_only=True)["average"]
    for name, weight in TokenDynamics.from_pretrained(finished / "world").state_dict().items():
        assert torch.equal(weight, average[name])


def test_validation_is_of_the_averaged_weights(finished, tokenizer):
    clips = Clips(FrameCache.open(finished / "cache" / "validation"), 3, 0, CPU)
    actions = ActionTokens.load(finished / "world")
    tokens = WindowTokens(clips, CompressiveTokenizer.from_pretrained(tokenizer), actions)
    model = TokenDynamics.from_pretrained(finished / "world")
    told = tokens.sequences(clips.spread(4))
    logits, targets = predictions(model, tokens.vocabulary, told)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    last = [entry for entry in log(finished) if entry["group"] == "validation"][-1]
    assert last["loss"] == pytest.approx(loss.item(), abs=1e-4)
    frames = told[:, 68:].unflatten(1, (2, 11))[..., 7:]
    before = torch.stack([told[:, 64:68], frames[:, 0]], 1)
    assert last["copy_accuracy"] == pytest.approx(
        (before == frames).float().mean().item(), abs=1e-4
    )


def test_it_learns_a_few_windows_by_heart(tmp_path, tokenizer):
    data = tiny.write_dataset(tmp_path, length=3)
    config = dynamics_training(
        data,
        tmp_path / "run",
        tokenizer,
        steps=120,
        micro_batch=4,
        learning_rate=1e-2,
        warmup=10,
        augment=False,
        validate_every=120,
        save_every=120,
    )
    model = TokenDynamics.from_pretrained(train_dynamics(config, progress=False))
    steps = [entry for entry in log(tmp_path / "run") if entry["group"] == "train"]
    assert steps[0]["loss"] > 8.5
    assert steps[-1]["loss"] < 0.3
    clips = Clips(FrameCache.open(tmp_path / "run" / "cache" / "train"), 3, 0, CPU)
    actions = ActionTokens.load(tmp_path / "run" / "world")
    tokens = WindowTokens(clips, CompressiveTokenizer.from_pretrained(tokenizer), actions)
    told = tokens.sequences(range(len(clips)))
    assert accuracy(*predictions(model, tokens.vocabulary, told)).mean() > 0.95


# --- tokens -------------------------------------------------------------------------------------


def test_tokens_are_kept_on_disk_where_they_never_change(finished, tokenizer, tmp_path):
    frozen = CompressiveTokenizer.from_pretrained(tokenizer)
    cache = FrameCache.open(finished / "cache" / "train")
    plain, varied = (Clips(cache, 3, 0, CPU, augment=augment) for augment in (False, True))
    direct = WindowTokens(plain, frozen, ActionTokens())
    expected = direct.sequences([3, 0, 3])
    kept = WindowTokens(plain, frozen, ActionTokens(), tmp_path)
    assert torch.equal(kept.sequences([3], [7]), expected[:1])
    (file,) = tmp_path.iterdir()
    rows = np.memmap(file, np.uint16, "r+", shape=(len(plain), 64 + 3 * 4))
    assert [row for row in range(len(plain)) if rows[row].all()] == [3]
    rows[3, :2] += 1
    rows[5, :10] = 9  # a write that was killed
    again = WindowTokens(plain, frozen, ActionTokens(), tmp_path)
    assert (again.sequences([3])[0, :3] - expected[0, :3]).tolist() == [1, 1, 0]
    assert torch.equal(again.sequences([5]), direct.sequences([5]))
    looked = WindowTokens(varied, frozen, ActionTokens(), tmp_path)
    assert not torch.equal(looked.sequences([3], [7]), looked.sequences([3], [8]))
    assert torch.equal(looked.sequences([0]), expected[1:2])


def test_room_is_taken_only_for_tokens_that_never_change(
    finished, tiny_dataset, tokenizer, tmp_path
):
    def parts(out):
        return sorted(file.parent.name for file in (out / "cache").glob("*/tokens-*.u16"))

    assert parts(finished) == ["validation"]
    config = dynamics_training(tiny_dataset, tmp_path, tokenizer, steps=1, augment=False)
    train_dynamics(config, progress=False)
    assert parts(tmp_path) == ["train", "validation"]


def test_tokens_are_kept_where_room_cannot_be_taken(finished, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    frozen = CompressiveTokenizer.from_pretrained(tokenizer)
    clips = Clips(FrameCache.open(finished / "cache" / "train"), 3, 0, CPU)
    expected = WindowTokens(clips, frozen, ActionTokens(), tmp_path).sequences([3])
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    assert len(before) == 2 * len(clips) * 76
    assert torch.equal(
        WindowTokens(clips, frozen, ActionTokens(), tmp_path).sequences([3]), expected
    )
    assert file.read_bytes() == before


def test_a_disk_without_room_for_the_tokens_is_an_error(finished, tokenizer, tmp_path):
    frozen = CompressiveTokenizer.from_pretrained(tokenizer)
    clips = Clips(FrameCache.open(finished / "cache" / "train"), 3, 0, CPU)
    WindowTokens(clips, frozen, ActionTokens(), tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= file.stat().st_size == 2 * len(clips) * 76
    file.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"the tokens of all windows take .*{file}"):
            WindowTokens(clips, frozen, ActionTokens(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_sequences_are_those_of_the_world(finished, tokenizer):
    """Context, first frame and actions stand where generation expects them."""
    clips = Clips(FrameCache.open(finished / "cache" / "train"), 3, 0, CPU)
    world = load_token_world(finished / "world", horizon=2, memory_gib=0.01)
    tokens = WindowTokens(clips, world.tokenizer, world.actions)
    frame = clips.pictures([4])[:, :1]
    state = world.start(frame, torch.zeros(1, 1, 8))
    told = tokens.sequences([4])
    assert torch.equal(told[:, :68], state.prefix)
    expected = world.vocabulary.actions(world.actions.encode(clips.actions([4])))
    assert torch.equal(told[:, 68:75], expected[:, 0])


def test_images_of_another_size_are_resized(tiny_dataset, tmp_path):
    from wmgym.data.frame_cache import resize

    shape = dataclasses.replace(TOKENIZER, resolution=64)
    CompressiveTokenizer(shape).save_pretrained(tmp_path / "large")
    config = dynamics_training(tiny_dataset, tmp_path / "run", tmp_path / "large", steps=1)
    train_dynamics(config, progress=False)
    cache = FrameCache.open(tmp_path / "run" / "cache" / "train")
    from wmgym.data import LeRobotDataset

    info = cache.episodes[0]
    images = LeRobotDataset(tiny_dataset).read(info.episode_id).images
    assert np.array_equal(cache.frames[: len(images)], resize(images, (64, 64)))


# --- actions ------------------------------------------------------------------------------------


def test_ranges_span_the_actions_in_their_convention():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.6, 0.4, (500, 7)).astype(np.float32)
    actions[:, 6] = rng.choice([-1, 1], 500)
    actions[:, 3] = 0.25
    raw = fit_actions(actions, "raw", "data")
    assert raw.quantiles is None
    np.testing.assert_allclose(raw.ranges[0], (actions[:, 0].min(), actions[:, 0].max()))
    assert raw.ranges[3] == pytest.approx((0.25, 0.251))
    bins = raw.encode(torch.from_numpy(actions))
    assert bins[:, 0].min() == 0
    assert bins[:, 0].max() == 255
    scaled = fit_actions(actions, "normalised", "data")
    low, high = np.quantile(actions[:, 1], (0.01, 0.99))
    assert scaled.quantiles[1] == pytest.approx((low, high))
    assert scaled.ranges[1] == pytest.approx((-1, 1))
    assert scaled.ranges[6] == (0, 1)
    assert fit_actions(actions, "raw", "published").ranges == PUBLISHED_RANGES


def test_the_convention_is_an_entry_of_the_checkpoint(tiny_dataset, tokenizer, tmp_path):
    config = dynamics_training(
        tiny_dataset, tmp_path, tokenizer, steps=1, action_space="normalised", ranges="published"
    )
    world = train_dynamics(config, progress=False)
    entries = json.loads((world / "actions.json").read_text())
    assert entries["action_space"] == "normalised"
    assert len(entries["quantiles"]) == 6
    cache = FrameCache.open(tmp_path / "cache" / "train")
    expected = np.quantile(cache.actions[:, 2].astype(np.float64), (0.01, 0.99))
    np.testing.assert_allclose(entries["quantiles"][2], expected)


# --- going on -----------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bits(finished, tiny_dataset, tokenizer, tmp_path):
    config = dynamics_training(tiny_dataset, tmp_path, tokenizer)
    interrupted(module, 5, lambda: train_dynamics(config, progress=False))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    train_dynamics(config, progress=False)
    assert log(tmp_path) == log(finished)


def test_init_from_goes_on_with_a_world_and_its_actions(
    finished, tiny_dataset, tokenizer, tmp_path
):
    config = dynamics_training(
        tiny_dataset,
        tmp_path,
        tokenizer,
        steps=1,
        learning_rate=1e-7,
        init_from=str(finished / "world"),
        dynamics=dataclasses.replace(DYNAMICS, hidden_size=64),
    )
    world = train_dynamics(config, progress=False)
    before, after = (TokenDynamics.from_pretrained(f / "world") for f in (finished, tmp_path))
    assert after.config == before.config == DYNAMICS
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-5, rtol=0)
    assert ActionTokens.load(world) == ActionTokens.load(finished / "world")


def test_what_is_said_of_actions_goes_before_those_of_init_from(
    finished, tiny_dataset, tokenizer, tmp_path
):
    config = dynamics_training(
        tiny_dataset,
        tmp_path,
        tokenizer,
        steps=1,
        init_from=str(finished / "world"),
        action_space="normalised",
        ranges="published",
    )
    world = train_dynamics(config, progress=False)
    actions = ActionTokens.load(world)
    assert (actions.action_space, actions.ranges) == ("normalised", PUBLISHED_RANGES)
    notes = json.loads((world / "training.json").read_text())
    assert (notes["action_space"], notes["ranges"]) == ("normalised", "published")
    assert notes["actions"]["quantiles"] == [list(pair) for pair in actions.quantiles]


def test_a_run_goes_on_with_the_same_data_and_tokenizer_only(tiny_dataset, tokenizer, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    mine = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = dynamics_training(data, tmp_path / "run", mine, steps=1)
    train_dynamics(config, progress=False)
    longer = dataclasses.replace(config, steps=2)
    data.rename(tmp_path / "before")
    tiny.write_dataset(tmp_path / "other", length=7).rename(data)
    with pytest.raises(CheckpointError, match=r"data_fingerprints was \['\w+'\], is \['\w+'\]"):
        train_dynamics(longer, progress=False)
    data.rename(tmp_path / "after")
    (tmp_path / "before").rename(data)
    model = CompressiveTokenizer.from_pretrained(mine)
    model.quant_linear.bias.add_(0.1)
    model.save_pretrained(mine)
    with pytest.raises(CheckpointError, match=r"other settings: tokenizer_digest was '\w+', is"):
        train_dynamics(longer, progress=False)
    shutil.rmtree(mine)
    shutil.copytree(tokenizer, mine)
    train_dynamics(longer, progress=False)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"action_space": "scaled"}, "action_space='scaled': allowed are"),
        ({"ranges": "mine"}, "ranges='mine': allowed are"),
        ({"sharding": "ddp"}, "sharding='ddp': allowed are"),
        ({"validate_every": 0}, "validate_every=0"),
        ({"clip": -1.0}, r"clip=-1\.0: must be > 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: must be > 0"),
        ({"warmup": -1}, "warmup=-1: must be >= 0"),
    ],
)
def test_a_recipe_refuses_nonsense(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        dynamics_training(tmp_path, tmp_path, tmp_path, **changes)


def test_what_does_not_fit_is_refused(tiny_dataset, tokenizer, tmp_path):
    def train(tokenizer=tokenizer, **changes):
        train_dynamics(dynamics_training(tiny_dataset, tmp_path, tokenizer, **changes))

    small = dataclasses.replace(DYNAMICS, vocab_size=9000, max_position_embeddings=80)
    with pytest.raises(ValueError, match="3 frames need 9006 and 90"):
        train(dynamics=small)
    with pytest.raises(ValueError, match=r"needs several processes: torchrun"):
        train(sharding="fsdp", ema=0.0)
    with pytest.raises(ValueError, match=r"ema=0\.9: with sharding='fsdp'"):
        train(sharding="fsdp")
    with pytest.raises(CheckpointError, match="neither a folder"):
        train(tokenizer="nowhere")


def test_presets_are_recipes(tmp_path):
    for changes in PRESETS.values():
        DynamicsTraining(data=(tmp_path,), out=tmp_path, tokenizer="x", **changes)
