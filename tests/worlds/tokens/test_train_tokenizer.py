"""Training of the published tokenizer: it learns, it resumes, it leaves what can be loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from published_train_tiny import STEPS, TOKENIZER, interrupted, tokenizer_training

from wmgym.checkpoints import CheckpointError
from wmgym.data import FrameCache
from wmgym.worlds.tokens import train_tokenizer as module
from wmgym.worlds.tokens.clips import Clips
from wmgym.worlds.tokens.compressive import CompressiveTokenizer
from wmgym.worlds.tokens.discriminator import DiscriminatorConfig
from wmgym.worlds.tokens.train_tokenizer import PRESETS, TokenizerTraining, train_tokenizer

CPU = torch.device("cpu")


def log(out: Path, group: str) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in entry.items() if k != "seconds"}
        for entry in entries
        if entry["group"] == group
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dataset) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tokenizer"
    config = tokenizer_training(tiny_dataset, out)
    assert train_tokenizer(config, progress=False) == out / "tokenizer"
    return out


def model(seed: int = 0) -> CompressiveTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompressiveTokenizer(TOKENIZER)


# --- the forward pass ---------------------------------------------------------------------------


def test_reconstructing_is_encoding_and_decoding():
    frames = tiny.rows(2, 1)[0].repeat(1, 2, 1, 1, 1)[:, :3]
    one = model().eval()
    expected = one.decode(*one.encode(frames))
    torch.testing.assert_close(one.reconstruct(frames), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, 32, 32\)"):
        one.reconstruct(frames[..., 1:])


def test_the_gradient_reaches_every_weight():
    one = model()
    frames = tiny.rows(1, 1)[0]
    (one.reconstruct(frames) - frames).abs().mean().backward()
    idle = [n for n, p in one.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


# --- what a run does ----------------------------------------------------------------------------


def test_a_run_leaves_a_tokenizer_in_the_published_layout(finished):
    assert not list(finished.rglob("*.part"))
    one = CompressiveTokenizer.from_pretrained(finished / "tokenizer")
    assert one.config == TOKENIZER
    notes = json.loads((finished / "tokenizer" / "training.json").read_text())
    assert notes["steps_done"] == STEPS
    assert notes["lpips"] == "alex"
    average = torch.load(finished / "checkpoint.pt", weights_only=True)["average"]
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, average[name])


def test_the_discriminator_plays_from_its_step_on(finished):
    steps = log(finished, "train")
    assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
    assert ["discriminator" in entry for entry in steps] == [False] * 2 + [True] * (STEPS - 2)
    for entry in steps:
        terms = ("context_l1", "later_l1", "context_lpips", "later_lpips")
        total = sum(entry[name] for name in terms) + 0.1 * entry.get("adversarial", 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_validation_is_of_the_averaged_weights_on_held_out_clips(finished):
    one = CompressiveTokenizer.from_pretrained(finished / "tokenizer")
    clips = Clips(FrameCache.open(finished / "cache" / "validation"), 3, 0, CPU)
    far = []
    for row in clips.spread(4):
        real = clips.pictures([row])
        drawn = one.decode(*one.encode(real)).clamp(0, 1)
        far.append((drawn - real)[:, 1:].abs().mean().item())
    scores = log(finished, "validation")
    assert [entry["step"] for entry in scores] == [3, 6]
    assert scores[-1]["later_l1"] == pytest.approx(sum(far) / 4, abs=2e-5)
    assert scores[-1]["codes"] >= 1


def test_it_learns_a_few_clips_by_heart(tmp_path):
    data = tiny.write_dataset(tmp_path, length=3)
    config = tokenizer_training(
        data,
        tmp_path / "run",
        steps=50,
        batch_size=2,
        micro_batch=2,
        learning_rate=3e-3,
        warmup=5,
        context_lead=0,
        augment=False,
        adversarial_from=30,
        ema=0.8,
        validate_every=50,
        save_every=50,
    )
    one = CompressiveTokenizer.from_pretrained(train_tokenizer(config, progress=False))
    steps = log(tmp_path / "run", "train")
    assert steps[-1]["loss"] < 0.15 * steps[0]["loss"]
    clips = Clips(FrameCache.open(tmp_path / "run" / "cache" / "train"), 3, 0, CPU)
    real = clips.pictures(range(len(clips)))
    drawn = one.decode(*one.encode(real))
    assert (drawn - real).abs().mean() < 0.05


def test_a_run_in_bfloat16_without_opposition(tiny_dataset, tmp_path):
    config = tokenizer_training(
        tiny_dataset, tmp_path, steps=1, bfloat16=True, adversarial_weight=0.0, ema=0.0
    )
    one = CompressiveTokenizer.from_pretrained(train_tokenizer(config, progress=False))
    assert {weight.dtype for weight in one.state_dict().values()} == {torch.float32}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["average"] is None
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, state["model"][name])


# --- going on -----------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bits(finished, tiny_dataset, tmp_path):
    config = tokenizer_training(tiny_dataset, tmp_path)
    interrupted(module, 5, lambda: train_tokenizer(config, progress=False))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    train_tokenizer(config, progress=False)
    for group in ("train", "validation"):
        assert log(tmp_path, group) == log(finished, group)
    with pytest.raises(CheckpointError, match="other settings: micro_batch was 1, is 2"):
        train_tokenizer(dataclasses.replace(config, micro_batch=2), progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    told = {k: v for k, v in json.loads(state["settings"]).items() if k != "data_fingerprints"}
    torch.save(state | {"settings": json.dumps(told)}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="data_fingerprints was not told, is"):
        train_tokenizer(config, progress=False)


def test_init_from_takes_weights_and_shape(finished, tiny_dataset, tmp_path):
    config = dataclasses.replace(
        tokenizer_training(tiny_dataset, tmp_path, steps=1, learning_rate=1e-7),
        tokenizer=TokenizerTraining(data=(tiny_dataset,), out=tmp_path).tokenizer,
        init_from=str(finished / "tokenizer"),
    )
    after = CompressiveTokenizer.from_pretrained(train_tokenizer(config, progress=False))
    before = CompressiveTokenizer.from_pretrained(finished / "tokenizer")
    assert after.config == before.config
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-5, rtol=0)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"micro_batch": 3}, "batch_size=4 is not a multiple of micro_batch=3"),
        ({"frames": 1}, "frames=1"),
        ({"context_lead": -1}, "context_lead=-1"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"validation_states": (25, 41)}, r"\[41\]"),
    ],
)
def test_a_recipe_refuses_nonsense(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        tokenizer_training(tmp_path, tmp_path, **changes)


def test_no_data_and_too_deep_a_discriminator_are_refused(tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match="data is empty"):
        TokenizerTraining(data=(), out=tmp_path)
    deep = tokenizer_training(tiny_dataset, tmp_path, discriminator=DiscriminatorConfig(32, 6))
    with pytest.raises(ValueError, match="depths up to 4"):
        train_tokenizer(deep, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_dataset, tmp_path):
    config = tokenizer_training(tiny_dataset, tmp_path, learning_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train_tokenizer(config, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_presets_are_recipes(tmp_path):
    for changes in PRESETS.values():
        TokenizerTraining(data=(tmp_path,), out=tmp_path, **changes)
