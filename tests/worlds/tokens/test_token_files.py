"""Published worlds on disk: strict, atomic, and readable by others."""

from __future__ import annotations

import dataclasses
import json
import os

import gymnasium as gym
import mended_torchvision  # noqa: F401 - before transformers imports it
import numpy as np
import pytest
import torch
import transformers
from published_tiny import DYNAMICS, TOKENIZER, clips, dynamics, filled, save, tokenizer
from safetensors.torch import load_file, save_file

from wmgym.checkpoints import CheckpointError
from wmgym.envs.resources import resolve_world
from wmgym.extras import MissingExtraError
from wmgym.worlds import CompressiveTokenizer, TokenDynamics, load_token_world, load_world
from wmgym.worlds.checkpoints import world_digest
from wmgym.worlds.evaluate import evaluate
from wmgym.worlds.tokens import folders
from wmgym.worlds.tokens.action_tokens import PUBLISHED_RANGES, ActionTokens
from wmgym.worlds.tokens.token_world import TokenWorld
from wmgym.worlds.tokens.transformer import TokenDynamicsConfig

KINDS = {
    "tokenizer": (CompressiveTokenizer, tokenizer, "diffusion_pytorch_model.safetensors"),
    "dynamics": (TokenDynamics, dynamics, "model.safetensors"),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    cls, make, weights = KINDS[request.param]
    make().save_pretrained(tmp_path)
    return cls, make(), tmp_path, tmp_path / weights


def test_saving_and_loading_gives_the_same_tensors(kind, tmp_path):
    cls, model, folder, weights = kind
    loaded = cls.from_pretrained(folder)
    assert loaded.config == model.config
    loaded.save_pretrained(tmp_path / "again")
    first, again = load_file(weights), load_file(tmp_path / "again" / weights.name)
    assert first.keys() == again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name])
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (folder / "config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_every_key_must_be_there_and_no_other(kind):
    cls, _, folder, weights = kind
    tensors = load_file(weights)
    name = sorted(tensors)[3]
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(CheckpointError, match=f"missing .*{name}"):
        cls.from_pretrained(folder)
    save_file({}, weights)
    with pytest.raises(CheckpointError, match=rf"missing .*and {len(tensors) - 10} more"):
        cls.from_pretrained(folder)
    save_file({**tensors, "surplus.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"unknown .*surplus\.weight"):
        cls.from_pretrained(folder)
    save_file({**tensors, name: torch.zeros(3, 3)}, weights)
    with pytest.raises(CheckpointError, match=rf"{name}: \(3, 3\) instead of"):
        cls.from_pretrained(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        cls.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("dynamics", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, 'silu' is"),
        ("dynamics", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ("dynamics", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ("dynamics", {"rope_parameters": [1]}, r"rope_parameters=\[1\] is list"),
        ("dynamics", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x': expected float"),
        ("dynamics", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "0.5} are not supported"),
        ("dynamics", {"partial_rotary_factor": 0.5}, "0.5} are not supported"),
        (
            "dynamics",
            {"model_type": "mistral"},
            "model_type='mistral' is not supported, 'llama' is",
        ),
        ("dynamics", {"hidden_size": -32}, "hidden_size=-32: must be >= 1"),
        ("dynamics", {"hidden_size": 10**12}, "config.json: "),
        ("dynamics", {"head_dim": 7}, "width 7: rotary positions need an even one"),
        ("dynamics", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': expected float"),
        ("dynamics", {"max_position_embeddings": None}, "None: expected int"),
        ("dynamics", {"num_key_value_heads": 0}, "kv_heads=0: must be >= 1"),
        ("dynamics", {"num_key_value_heads": 3}, "multiple"),
        ("tokenizer", {"context_length": 2}, "context_length=2 is not supported, 1 is"),
        ("tokenizer", {"norm_type": "spatial"}, "norm_type"),
        ("tokenizer", {"dyn_fsq_levels": 9}, "allowed are"),
        ("tokenizer", {"resolution": 30}, "multiple of 8"),
        ("tokenizer", {"resolution": [32, 32]}, r"resolution=\[32, 32\]: expected int"),
        ("tokenizer", {"latent_channels": 8.0}, r"latent_channels=8\.0: expected int"),
        ("tokenizer", {"block_out_channels": [30, 30], "norm_num_groups": 10}, "multiple of 32"),
        ("tokenizer", {"block_out_channels": [30, 32]}, "multiples of norm_num_groups=32"),
        ("tokenizer", {"norm_num_groups": 0}, "norm_num_groups=0: must be >= 1"),
        ("tokenizer", {"_class_name": "AutoencoderKL"}, "'CompressiveVQModelFSQ' is"),
    ],
)
def test_what_is_not_computed_is_refused(name, change, said, tmp_path):
    cls, make, _ = KINDS[name]
    make().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "damaged"), ("[]", "expected a JSON object")])
def test_damaged_configs_are_told(text, said, tmp_path):
    dynamics().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        TokenDynamics.from_pretrained(tmp_path)


def test_transformers_loads_the_dynamics_and_gets_the_same_logits(tmp_path):
    dynamics().save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(9008, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            dynamics().logits(tokens), other(tokens).logits, atol=1e-5, rtol=1e-4
        )


def test_what_transformers_writes_is_loaded(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=9008,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = transformers.LlamaForCausalLM(config).eval()
    other.save_pretrained(tmp_path)
    ours = TokenDynamics.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 5000.0
    tokens = torch.randint(9008, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), other(tokens).logits, atol=1e-5, rtol=1e-4)


def test_tokens_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"tokens are 0 \.\.\. 9008, allowed 0 \.\.\. 9007"):
        dynamics().logits(torch.tensor([[0, 9008]]))
    with pytest.raises(ValueError, match="expected"):
        dynamics().logits(torch.zeros(3, dtype=torch.int64))
    model = tokenizer()
    with pytest.raises(ValueError, match="frames have shape"):
        model.encode(torch.zeros(1, 2, 3, 32, 16))
    context, later = torch.zeros(1, 1, 256).long(), torch.zeros(1, 2, 16).long()
    with pytest.raises(ValueError, match="without offset"):
        model.decode(context + 4375, later)
    with pytest.raises(ValueError, match="dynamics tokens have shape"):
        model.decode(context, later[..., :9])
    with pytest.raises(ValueError, match="context frames"):
        model.decode(context.repeat(1, 2, 1), later)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda x: x * 255, ValueError, r"frames are 0 \.\.\. 255, expected 0 \.\.\. 1: divide"),
        (lambda x: x * torch.nan, ValueError, "frames are nan"),
        (
            lambda x: x.to(torch.uint8),
            TypeError,
            r"frames are torch\.uint8, expected floats: frames",
        ),
        (lambda x: x.numpy(), TypeError, "frames are ndarray"),
        (lambda x: x[:0], ValueError, r"shape \(0, 2, 3, 32, 32\), expected .* B >= 1"),
    ],
)
def test_frames_that_are_none_are_refused(change, error, said):
    frames = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(1, 2, 3, 32, 32)
    with pytest.raises(error, match=said):
        tokenizer().encode(change(frames))
    tokens = tokenizer().encode(frames)
    for again, first in zip(tokenizer().encode(frames.double()), tokens, strict=True):
        assert torch.equal(again, first)


def test_tokens_that_are_none_are_refused():
    context, later = torch.zeros(1, 1, 256).long(), torch.zeros(1, 2, 16).long()
    with pytest.raises(TypeError, match=r"dynamics tokens are torch\.float32, expected .*integers"):
        tokenizer().decode(context, later.float())
    with pytest.raises(ValueError, match="dynamics tokens have shape"):
        tokenizer().decode(context, later[0, 0])
    with pytest.raises(ValueError, match="context tokens have shape"):
        tokenizer().decode(context[:0], later[:0])
    with pytest.raises(TypeError, match=r"tokens are torch\.float32, expected .* integers"):
        dynamics().logits(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="tokens are ndarray"):
        dynamics().logits(np.zeros((1, 4), np.int64))


def test_weights_that_could_not_be_read_are_not_written(kind, tmp_path):
    _, model, *_ = kind
    next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinity are not written"):
        model.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_new_tokenizer_gives_the_same_tokens_twice():
    frames = torch.rand(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = CompressiveTokenizer(TOKENIZER)
    assert torch.equal(model.encode(frames)[1], model.encode(frames)[1])


def test_clips_without_later_frames(tmp_path):
    frames, *_ = clips(2)
    context, later = tokenizer().encode(frames)
    assert later.shape == (2, 0, 16)
    assert tokenizer().decode(context, later).shape == (2, 1, 3, 32, 32)


@pytest.mark.parametrize("place", ["tokenizer", "../Tokenizer", "../tokenizer"])
def test_the_tokenizer_is_found_inside_or_beside(place, tmp_path):
    folder = tmp_path / "libero_object"
    dynamics().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_world(folder)
    tokenizer().save_pretrained(folder / place)
    ActionTokens(action_space="raw").save(folder)
    world = load_world(folder)
    assert isinstance(world, TokenWorld)
    assert world.name == "libero_object"
    assert load_token_world(folder, tokenizer=folder / place).image_size == (32, 32)


def test_a_folder_stands_for_the_only_dynamics_in_it(tmp_path):
    dynamics().save_pretrained(tmp_path / "transformer")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    ActionTokens(bins=7).save(tmp_path)
    for world in (
        load_world(tmp_path),
        load_token_world(tmp_path),
        resolve_world(tmp_path, "cpu", "float32"),
    ):
        assert world.actions.bins == 7
        assert world.name == tmp_path.name
    dynamics().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is no world"):
        load_world(tmp_path)


def test_the_digest_is_of_what_is_read(tmp_path):
    folder = save(tmp_path / "libero_object")
    before = world_digest(folder)
    tokenizer().save_pretrained(tmp_path / "Tokenizer")  # the one inside goes before
    ActionTokens(bins=7).save(tmp_path)
    assert world_digest(folder) == before
    ActionTokens(bins=7).save(folder)
    assert world_digest(folder) != before


def test_dynamics_are_known_without_a_name_of_their_kind(tmp_path):
    folder = save(tmp_path / "world")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(load_world(folder), TokenWorld)


def test_norms_before_a_look_at_the_context_have_32_groups_as_released():
    for groups in (8, 32):
        model = CompressiveTokenizer(dataclasses.replace(TOKENIZER, norm_num_groups=groups))
        assert model.encoder.conv_norm_out.num_groups == groups
        for half in (model.cond_encoder, model.cond_decoder):
            for look in half.cross_att_blocks:
                assert look.q_norm.num_groups == look.kv_norm.num_groups == 32


def test_the_innermost_part_of_a_drawing_always_looks_at_the_context():
    model = tokenizer(dataclasses.replace(TOKENIZER, max_att_resolution=8))
    assert model.cond_encoder.looks == []
    assert model.cond_decoder.looks == [0]
    context, later = model.encode(clips(1)[0].expand(1, 2, 3, 32, 32))
    assert model.decode(context, later).shape == (1, 2, 3, 32, 32)


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.uint32])
def test_tokens_are_integers_of_any_size(kind):
    context, later = tokenizer().encode(clips(1)[0].expand(1, 2, 3, 32, 32))
    drawn = tokenizer().decode(context.to(kind), later.to(kind))
    assert torch.equal(drawn, tokenizer().decode(context, later))
    tokens = torch.arange(9000, 9008)[None]
    assert torch.equal(dynamics().logits(tokens.to(kind)), dynamics().logits(tokens))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": None},
        {"eos_token_id": [9007, 9006]},
    ],
)
def test_configs_that_mean_the_same_are_read(change):
    described = DYNAMICS.describe() | change
    config = TokenDynamicsConfig.of(described)
    assert dataclasses.replace(config, eos_token_id=9007) == DYNAMICS
    assert TokenDynamicsConfig.of(json.loads(json.dumps(config.describe()))) == config


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    folder = save(tmp_path / "world")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    with pytest.raises(CheckpointError, match="positions"):
        load_world(folder)


def test_ids_on_the_hub_need_its_package(monkeypatch, tmp_path):
    def missing(module, extra):
        raise MissingExtraError(f"{module}: pip install 'wmgym[{extra}]'")

    monkeypatch.setattr(folders, "require", missing)
    with pytest.raises(MissingExtraError, match=r"no folder VLA-RFT/.*wmgym\[hub\]"):
        load_world("VLA-RFT/WorldModel-Libero-Object")
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        TokenDynamics.from_pretrained("nowhere")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What is asked of a hub with a world and its tokenizer."""
    repositories = {
        "owner/WorldModel-Libero-Object": tmp_path / "a",
        "owner/WorldModel-Tokenizer": tmp_path / "b",
    }
    dynamics().save_pretrained(tmp_path / "a")
    tokenizer().save_pretrained(tmp_path / "b")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append((name, tuple(allow_patterns)))
            if name not in repositories:
                raise OSError("404")
            return str(repositories[name])

    monkeypatch.setattr(folders, "require", lambda module, extra: Hub)
    return asked


def test_worlds_on_the_hub_bring_their_tokenizer(hub):
    assert load_world("owner/WorldModel-Libero-Object").name == "WorldModel-Libero-Object"
    assert {name for name, _ in hub} == {
        "owner/WorldModel-Libero-Object",
        "owner/WorldModel-Tokenizer",
    }
    assert all("*" not in pattern for _, patterns in hub for pattern in patterns)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        load_world("owner/Nothing")


def test_the_digest_of_a_world_on_the_hub_knows_its_tokenizer(hub, tmp_path):
    name = "owner/WorldModel-Libero-Object"
    before = world_digest(name)
    filled(CompressiveTokenizer(TOKENIZER), "other").save_pretrained(tmp_path / "b")
    assert world_digest(name) != before


def test_environments_are_made_of_worlds_on_the_hub(hub):
    env = gym.make("wmgym:WorldModel-LIBERO-v0", world="owner/WorldModel-Libero-Object")
    assert env.observation_space["image"].shape == (32, 32, 3)
    assert "owner/WorldModel-Tokenizer" in {name for name, _ in hub}


def test_environments_see_a_world_that_was_edited(tmp_path):
    folder = save(tmp_path / "object")
    before = resolve_world(folder, "cpu", "float32")
    assert resolve_world(folder, "cpu", "float32") is before
    for name in (
        "config.json",
        "actions.json",
        "tokenizer/config.json",
        "tokenizer/diffusion_pytorch_model.safetensors",
        "../libero_action_ranges.pth",
    ):
        (folder / name).touch()
        os.utime(folder / name, ns=(0, 1))
        after = resolve_world(folder, "cpu", "float32")
        assert after is not before, name
        before = after


def test_ranges_of_actions(tmp_path, caplog):
    dynamics().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load_token_world(tmp_path).actions.ranges == PUBLISHED_RANGES
    assert "does not say how actions become tokens" in caplog.text
    for dtype in (torch.float32, torch.bfloat16):
        table = (torch.tensor(PUBLISHED_RANGES) * 2).to(dtype)
        torch.save(table, tmp_path / "libero_action_ranges.pth")
        found = load_token_world(tmp_path).actions.ranges
        assert torch.equal(torch.tensor(found).to(dtype), table)
    quantiles = tuple((-0.5, 0.5 + 0.1 * i) for i in range(6))
    described = ActionTokens(action_space="normalised", quantiles=quantiles)
    described.save(tmp_path)
    assert load_token_world(tmp_path).actions == described
    for told, said in (
        ({"ranges": [[0, 1]]}, "expected 7 pairs"),
        ({"bins": 0}, "bins=0: allowed are integers >= 1"),
        ({"bins": 25.5}, r"bins=25\.5: allowed"),
        ({"quantiles": [[1, -1]] * 6}, "q01 first"),
        ({"quantiles": [[float("nan"), 1]] * 6}, "q01 first"),
    ):
        (tmp_path / "actions.json").write_text(json.dumps(told))
        with pytest.raises(CheckpointError, match=said):
            load_token_world(tmp_path)
    (tmp_path / "actions.json").unlink()
    (tmp_path / "libero_action_ranges.pth").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="ranges of actions"):
        load_token_world(tmp_path)


def test_published_worlds_are_scored(tmp_path, tiny_dataset):
    world = load_world(save(tmp_path / "world"))
    report = evaluate(world, [tiny_dataset], windows=2, horizon=2, progress=False)
    assert all(np.isfinite(value) for name, value in report.items() if name.endswith("psnr"))
    assert report["tokenizer_psnr"] != report["psnr"]


def test_bins_are_those_of_the_release():
    codes = ActionTokens()
    low, high = torch.tensor(PUBLISHED_RANGES).T
    assert codes.encode(low).tolist() == [0] * 7
    assert codes.encode(high).tolist() == [255] * 7
    assert codes.encode((low + high) / 2 + 1e-4).tolist() == [128] * 7
    assert codes.encode(torch.full((2, 3, 7), 9.0)).unique().tolist() == [255]
    edge = low + (high - low) * 17.5 / 256
    assert codes.encode(edge).tolist() == [17] * 7


def test_normalised_actions_are_scaled_and_the_gripper_turned():
    quantiles = ((-0.5, 0.7),) * 6
    codes = ActionTokens(((-1.0, 1.0),) * 7, "normalised", quantiles)
    action = torch.tensor([-0.5, 0.7, 0.1, -0.9, 0.45, 0.0, -1.0])
    scaled = [-1, 1, 0, -1, 2 * 0.95 / 1.2 - 1, 2 * 0.5 / 1.2 - 1]
    bins = [min(int(256 * (x + 1) / 2 + 1e-4), 255) for x in scaled]
    assert codes.encode(action).tolist() == [*bins, 255]  # open is 1
    action[6] = 1.0
    assert codes.encode(action)[6] == 128  # closed is 0
    with pytest.raises(ValueError, match="needs quantiles"):
        ActionTokens(action_space="normalised")
    with pytest.raises(ValueError, match="allowed are"):
        ActionTokens(action_space="delta")


def test_shapes_of_the_published_configs():
    assert (TOKENIZER.context_tokens, TOKENIZER.dynamics_tokens) == (256, 16)
    assert type(TOKENIZER)().context_tokens == 1024
    assert type(TOKENIZER)().dynamics_tokens == 64
    assert DYNAMICS.kv_heads == 4
