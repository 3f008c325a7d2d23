"""The preset of the published shape: its context, its sizes, its folder and the published files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import shutil
import sys
from unittest.mock import ANY

import numpy as np
import pytest
import small
import tiny_vla
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from wmgym_agents import published as released
from wmgym_agents import vla_adapter
from wmgym_agents.policy import CONFIG, STATISTICS, TOKENIZER, WEIGHTS, FlowVLA
from wmgym_agents.policy import PRESETS as SHAPES
from wmgym_agents.published import load_published, load_published_backbone, load_published_head
from wmgym_agents.sft import PRESETS, SFTConfig, new_run, sft
from wmgym_agents.vla_adapter import VLAAdapterEncoder

from wmgym import cli
from wmgym.checkpoints import CheckpointError
from wmgym.extras import MissingExtraError

SUITE = "libero_object_no_noops"
INSTRUCTIONS = ["Pick up the milk", "open", "open the drawer and pick up the milk and open it"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_vla.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def config(tokenizer):
    return tiny_vla.config(tokenizer)


@pytest.fixture(scope="module")
def policy(config):
    """A policy that no test changes."""
    return small.policy(config, lively=0.3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observation(rows=3, size=28):
    return {**small.observation(rows, size=size), "instruction": INSTRUCTIONS[:rows]}


def pictures(rows=3, size=28):
    return torch.rand(rows, 3, size, size, generator=generator())


def slow_features(vit, picture, mean, std):
    """Patches after the second-to-last block, block by block."""
    x = (picture[None] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    x = vit._pos_embed(vit.patch_embed(x))
    for block in list(vit.blocks)[:-1]:
        x = block(x)
    return x[0, vit.num_prefix_tokens :]


def slow_context(dino, siglip, projector, language, queries, ids, picture):
    """The context of one observation, its sequence put together state by state."""
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    features = [
        torch.cat(pair)
        for pair in zip(
            slow_features(dino, picture, *imagenet),
            slow_features(siglip, picture, (0.5,) * 3, (0.5,) * 3),
            strict=True,
        )
    ]
    patches = [projector(each) for each in features]
    text = list(language.embed_tokens(torch.tensor(ids)))
    sequence = [("t", 0, text[0])]
    sequence += [("p", i, patch) for i, patch in enumerate(patches)]
    sequence += [("t", i, token) for i, token in enumerate(text) if i]
    sequence += [("q", i, query) for i, query in enumerate(queries)]
    inputs = torch.stack([each for _, _, each in sequence])[None]
    states = language(inputs_embeds=inputs).last_hidden_state[0]
    named = {(kind, i): state for (kind, i, _), state in zip(sequence, states, strict=True)}
    kept = [("t", 0)] + [("p", i) for i in range(len(patches) - 1)]
    kept += [("t", len(ids) - 1)] + [("q", i) for i in range(len(queries) - 1)]
    return torch.stack([named[name] for name in kept])


# --- the encoder --------------------------------------------------------------------------------


@torch.no_grad()
def test_the_context_is_the_published_slices(policy):
    encoder, images = policy.encoder, pictures()
    tokens = encoder(images, INSTRUCTIONS)
    assert tokens.shape == (3, 4 + 3, encoder.config.width)
    for row, (image, text) in enumerate(zip(images, INSTRUCTIONS, strict=True)):
        slow = slow_context(
            encoder.dino.vit,
            encoder.siglip.vit,
            encoder.projector,
            encoder.language,
            encoder.action_queries.weight,
            encoder.prompt_ids(text),
            image,
        )
        torch.testing.assert_close(tokens[row], slow, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(policy):
    encoder, images = policy.encoder, pictures()
    assert len({len(encoder.prompt_ids(text)) for text in INSTRUCTIONS}) == 3
    tokens = encoder(images, INSTRUCTIONS)
    for row in range(3):
        alone = encoder(images[row : row + 1], INSTRUCTIONS[row : row + 1])
        torch.testing.assert_close(tokens[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_seen_asked_and_queried_matters(policy, config):
    tokens = policy.encoder(pictures(), INSTRUCTIONS)
    assert not torch.allclose(tokens, policy.encoder(1 - pictures(), INSTRUCTIONS), atol=1e-2)
    others = policy.encoder(pictures(), INSTRUCTIONS[::-1])
    torch.testing.assert_close(tokens[:, :4], others[:, :4])  # patches come before the text
    assert not torch.allclose(tokens[0, 4:], others[0, 4:], atol=1e-2)
    changed = small.policy(config, lively=0.3).encoder
    changed.action_queries.weight[-1] += 1  # the last query is read by nobody
    torch.testing.assert_close(changed(pictures(), INSTRUCTIONS), tokens)
    changed.action_queries.weight[0] += 1
    assert not torch.allclose(changed(pictures(), INSTRUCTIONS), tokens, atol=1e-2)


def test_every_weight_that_is_trained_has_a_gradient(config):
    encoder = small.policy(config, lively=0.3).encoder
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(pictures(), INSTRUCTIONS)
    assert tokens.dtype == torch.float32
    tokens.square().sum().backward()
    trained = {name: w for name, w in encoder.named_parameters() if w.requires_grad}
    assert all(weight.grad is not None for weight in trained.values())
    queries = trained["action_queries.weight"].grad.abs().sum(dim=1)
    assert (queries > 0).tolist() == [True, True, False]


def test_the_prompt_is_that_of_training(policy):
    ids = policy.encoder.prompt_ids("Open the DRAWER")
    words = policy.encoder.tokenizer().convert_ids_to_tokens(ids)
    assert words[0] == "<|im_start|>"
    assert words[-3:] == ["<|im_start|>", "assistant", "\n"]
    assert words.count("<|im_start|>") == 3
    assert words.count("<|im_end|>") == 2
    assert words[words.index("to") + 1 :][:4] == ["open", "the", "drawer", "?"]


def test_positions_turn_as_in_qwen2_5(policy):
    frequencies = policy.encoder.language.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 1e-3]))


def test_the_defaults_have_the_published_number_of_weights():
    with torch.device("meta"):
        policy = FlowVLA(SHAPES["vla-adapter"], small.statistics())
    assert policy.device.type == "meta"

    def count(module):
        return sum(weight.numel() for weight in module.parameters())

    def vit(width, depth, mlp, positions, extra):
        attention = 3 * width * width + 3 * width + width * width + width
        block = attention + 2 * width * mlp + mlp + width + 4 * width
        patches = 3 * 14 * 14 * width + width
        return depth * block + patches + positions * width + 2 * width + extra

    encoder, head = policy.encoder, policy.head
    layer_scales, prefix = 24 * 2 * 1024, 5 * 1024
    assert count(encoder.dino) == vit(1024, 24, 4096, 256, layer_scales + prefix)
    width, mlp = 1152, 4304
    pool = 4 * width * width + 4 * width + width + 2 * width + 2 * width * mlp + mlp + width
    assert count(encoder.siglip) == vit(1152, 27, mlp, 256, pool)
    assert count(encoder.projector) == 2177 * 8704 + 8705 * 896 + 897 * 896
    assert count(encoder.language) == 494_032_768
    assert count(encoder.action_queries) == 64 * 896
    assert count(head.action_head) == 51_293_191
    assert len(head.action_head.state_dict()) == 199
    assert count(head.noisy_action_projector) == 805_504
    assert count(head.proprio_projector) == 811_776
    assert policy.config.chain.steps == 10
    assert encoder.dino.vit.patch_embed.num_patches + policy.config.encoder.queries == 320


# --- the policy ---------------------------------------------------------------------------------


def test_pictures_of_any_size_are_resized(policy):
    image = observation(2, size=40)["image"] // 2 + 64  # Pillow clips between its two passes
    ours = policy.resized(torch.from_numpy(image).movedim(-1, 1).float() / 255)
    theirs = [
        np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BICUBIC)) for i in image
    ]
    np.testing.assert_allclose(ours.movedim(1, -1).numpy() * 255, np.stack(theirs), atol=1.01)
    assert policy.encode(observation(size=40)).tokens.shape == (3, 7, 16)
    with pytest.raises(ValueError, match=r"expected uint8 \(B, H, W, 3\)"):
        policy.encode({**observation(), "image": np.zeros((3, 28, 28), np.uint8)})


def test_the_gripper_is_that_of_the_published_data(policy):
    chunks = torch.zeros(2, 7)
    chunks[:, -1] = torch.tensor([0.9, 0.1])  # open, closed
    assert policy.executed(chunks)[:, -1].tolist() == [-1.0, 1.0]
    recorded = torch.zeros(2, 7)
    recorded[:, -1] = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(policy.action_scale.to_unit(recorded)[:, -1], torch.tensor([1.0, 0]))
    with pytest.raises(ValueError, match="gripper='up': allowed are"):
        dataclasses.replace(policy.config, gripper="up")


def test_chains_have_the_density_they_were_drawn_with(policy):
    policy = small.policy(policy.config, lively=0.3).requires_grad_(False)
    policy.head.requires_grad_(True)
    seen = policy.encode(observation())
    assert not seen.tokens.requires_grad
    _, chain = policy.sample(seen, 4, generator())
    density, entropy = policy.log_prob(seen, chain)
    assert density.shape == entropy.shape == (12, 4, 7)
    assert ((density - chain.log_prob).exp() - 1).abs().max() < 1e-4
    density.mean().backward()
    assert policy.head.action_head.context_adapter.weight.grad.abs().sum() > 0


def sft_config(data, folder, **changes):
    return SFTConfig(
        data=(data,),
        out=folder / "run",
        steps=2,
        batch_size=4,
        draws=2,
        warmup=1,
        validation_windows=4,
        device="cpu",
        bfloat16=False,
        **changes,
    )


def test_it_is_fine_tuned_and_keeps_its_tokenizer(tiny_dataset, tmp_path, config):
    start = small.policy(config)
    start.save_pretrained(tmp_path / "start")
    settings = sft_config(tiny_dataset, tmp_path, init_from=str(tmp_path / "start"), ema=0.5)
    trained = FlowVLA.from_pretrained(sft(settings, progress=False))
    moved = {
        name
        for name, weight in trained.state_dict().items()
        if not torch.equal(weight, start.state_dict()[name])
    }
    for name in ("action_queries.weight", "projector.fc1.weight", "language.norm.weight"):
        assert f"encoder.{name}" in moved
    assert any(name.startswith("encoder.siglip.vit.blocks.1.") for name in moved)
    assert not any(".vit.blocks.2." in name or "attn_pool" in name for name in moved)


@pytest.fixture
def hubs(config, monkeypatch):
    """Weights as the libraries would download them; nothing is downloaded."""
    import timm
    import transformers

    create, asked = timm.create_model, []

    def filled(module, value):
        with torch.no_grad():
            for weight in module.parameters():
                weight.fill_(value)
        return module

    def create_model(name, *, pretrained, **shape):
        made = create(name, pretrained=False, **shape)
        if not pretrained:
            return made
        asked.append(name)
        return filled(made, 0.01 * len(asked))

    def from_pretrained(name, *, local_files_only):
        asked.append((name, local_files_only))
        return filled(vla_adapter._language_model(config.encoder.language), 0.03)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(transformers.Qwen2Model, "from_pretrained", from_pretrained)
    return asked


def test_fine_tuning_starts_from_the_published_backbone(tiny_dataset, tmp_path, config, hubs):
    settings = sft_config(tiny_dataset, tmp_path, policy=config)
    model = new_run(settings, torch.device("cpu")).model
    assert hubs == [config.encoder.dino.name, config.encoder.siglip.name, (ANY, False)]
    for number, part in enumerate(("dino", "siglip", "language"), start=1):
        weights = model.encoder.get_submodule(part).parameters()
        assert all((weight == 0.01 * number).all() for weight in weights)
    assert model.encoder.projector.fc1.weight.std() > 0
    assert PRESETS["vla-adapter"]["learning_rate"] < SFTConfig.learning_rate
    hubs.clear()
    sft(dataclasses.replace(settings, pretrained=False), progress=False)
    assert not hubs
    new_run(settings, torch.device("cpu"))  # a run that goes on has weights
    assert not hubs


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_without_a_network_it_is_said_what_to_do(library, tmp_path, config, hubs, monkeypatch):
    import timm
    import transformers

    def offline(*given, **named):
        raise OSError("no route to host\nmore")

    encoder = VLAAdapterEncoder(config.encoder)
    owner, name = {
        "timm": (timm, "create_model"),
        "transformers": (transformers.Qwen2Model, "from_pretrained"),
    }[library]
    monkeypatch.setattr(owner, name, offline)
    with pytest.raises(CheckpointError, match=r"\(no route to host\): .*pretrained=False"):
        encoder.load_pretrained()


def test_a_folder_holds_the_whole_policy_wherever_it_is(policy, tmp_path):
    policy.save_pretrained(tmp_path / "first", training={"steps": 7})
    policy.save_pretrained(tmp_path / "first", training={"steps": 8})
    shutil.move(tmp_path / "first", tmp_path / "second")
    document = json.loads((tmp_path / "second" / CONFIG).read_text())
    assert document["encoder"] == "vla-adapter"
    assert document["policy"]["encoder"]["tokenizer"] == TOKENIZER
    loaded = FlowVLA.from_pretrained(tmp_path / "second")
    seen = observation()
    assert np.array_equal(policy.act(seen, generator()), loaded.act(seen, generator()))
    assert loaded.config.head == policy.config.head
    assert loaded.config.gripper == "published"
    encoder = dataclasses.replace(loaded.config.encoder, tokenizer=policy.config.encoder.tokenizer)
    assert encoder == policy.config.encoder
    assert not list(tmp_path.glob("**/*.part"))


def test_folders_written_before_there_were_two_presets_load(tmp_path):
    policy = small.policy()
    policy.save_pretrained(tmp_path)
    document = json.loads((tmp_path / CONFIG).read_text())
    assert document.pop("encoder") == "small"
    del document["policy"]["gripper"]
    (tmp_path / CONFIG).write_text(json.dumps(document))
    assert FlowVLA.from_pretrained(tmp_path).config == policy.config
    (tmp_path / CONFIG).write_text(json.dumps({**document, "encoder": "large"}))
    with pytest.raises(CheckpointError, match=r"encoder='large'; allowed are \['small', 'vla-ad"):
        FlowVLA.from_pretrained(tmp_path)


@pytest.mark.parametrize("spoiled", ["{", "{}", None])
def test_a_folder_without_a_good_tokenizer_is_refused(policy, tmp_path, spoiled):
    policy.save_pretrained(tmp_path)
    if spoiled is None:
        shutil.rmtree(tmp_path / TOKENIZER)
    else:
        (tmp_path / TOKENIZER / "tokenizer.json").write_text(spoiled)
    with pytest.raises(CheckpointError, match="give a folder with the files of Qwen's tokenizer"):
        FlowVLA.from_pretrained(tmp_path)


def test_shapes_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="depth=1: 2 or more"):
        dataclasses.replace(config.encoder.dino, depth=1)
    coarse = dataclasses.replace(config.encoder.dino, name="vit_base_patch16_224")
    with pytest.raises(ValueError, match="both must see the same"):
        VLAAdapterEncoder(dataclasses.replace(config.encoder, siglip=coarse, image_size=112))
    little = dataclasses.replace(config.encoder.language, vocabulary=8)
    encoder = VLAAdapterEncoder(dataclasses.replace(config.encoder, language=little))
    with pytest.raises(CheckpointError, match="tokens, the language model only 8"):
        encoder.prompt_ids("open the drawer")


@pytest.mark.parametrize("module", ["timm", "transformers"])
def test_a_missing_library_names_the_extra(module, config, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'wmgym\[vla\]'"):
        VLAAdapterEncoder(config.encoder)


def test_a_torchvision_of_another_build_is_named(config, monkeypatch):
    def broken(*given):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vla_adapter, "require", broken)
    with pytest.raises(MissingExtraError, match="a torchvision that fits torch"):
        VLAAdapterEncoder(config.encoder)


# --- published files ----------------------------------------------------------------------------


class _LayerScale(nn.Module):
    """As in the published code, whose files say `scale_factor`."""

    def __init__(self, width):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return x * self.scale_factor


class _Projector(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.fc1 = nn.Linear(inputs, 4 * inputs)
        self.fc2 = nn.Linear(4 * inputs, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x):
        for layer in (self.fc1, self.fc2):
            x = nn.functional.gelu(layer(x))
        return self.fc3(x)


def published_backbone(config):
    """The modules of the published backbone under their names, filled at random."""
    import timm
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def vit(shape):
        made = timm.create_model(
            shape.name,
            num_classes=0,
            img_size=config.image_size,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
        )
        for block in made.blocks:
            for name in ("ls1", "ls2"):
                if not isinstance(getattr(block, name), nn.Identity):
                    setattr(block, name, _LayerScale(shape.width))
        return made

    backbone, shape = nn.Module(), config.language
    backbone.vision_backbone = nn.Module()
    backbone.vision_backbone.featurizer = vit(config.dino)
    backbone.vision_backbone.fused_featurizer = vit(config.siglip)
    backbone.projector = _Projector(config.dino.width + config.siglip.width, shape.width)
    backbone.language_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    backbone.action_queries = nn.Embedding(config.queries, shape.width)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.normal_(std=0.3, generator=generator(weight.numel()))
    return backbone.eval()


def published_head(policy):
    """Tables of the published `.pt` files, filled at random."""
    prefixes = {"action_head": "module.flow_predictor.dit.", "sigma_net": "std_predictor.dit."}
    tables = {}
    for module in ("action_head", "noisy_action_projector", "proprio_projector", "sigma_net"):
        weights = policy.head.get_submodule(module).state_dict()
        tables[module] = {
            prefixes.get(module, "module.") + name: torch.randn(t.shape, generator=generator(7))
            for name, t in weights.items()
        }
    low, high = policy.config.head.sigma
    tables["sigma_net"]["log_std_min"] = torch.tensor(low).log().bfloat16()
    tables["sigma_net"]["log_std_max"] = torch.tensor(high).log().bfloat16()
    return tables


@pytest.fixture(scope="module")
def backbone(config):
    with torch.random.fork_rng():
        return published_backbone(config.encoder)


@pytest.fixture
def published(policy, backbone, tokenizer, tmp_path):
    """A folder in the published layout, the backbone in two files."""
    folder = tmp_path / "published"
    shutil.copytree(tokenizer, folder)
    weights = {name: t.clone() for name, t in backbone.state_dict().items()}
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        path = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path)
    for module, table in published_head(policy).items():
        if module != "sigma_net":
            torch.save(table, folder / f"{module}--150000_checkpoint.pt")
    policy.statistics.save(folder / STATISTICS, SUITE)
    return folder


@torch.no_grad()
def test_a_published_folder_becomes_a_policy(published, policy, backbone, tmp_path):
    loaded = load_published(published, SUITE, policy.config)
    ids = loaded.encoder.prompt_ids(INSTRUCTIONS[0])
    image = pictures(1)
    slow = slow_context(
        backbone.vision_backbone.featurizer,
        backbone.vision_backbone.fused_featurizer,
        backbone.projector,
        backbone.language_model.model,
        backbone.action_queries.weight,
        ids,
        image[0],
    )
    tokens = loaded.encoder(image, INSTRUCTIONS[:1])[0]
    torch.testing.assert_close(tokens, slow, atol=1e-4, rtol=1e-3)
    for module, table in published_head(policy).items():
        weights = loaded.head.get_submodule(module).state_dict()
        if module != "sigma_net":
            assert all(t.equal(v) for t, v in zip(weights.values(), table.values(), strict=True))
    loaded.save_pretrained(tmp_path / "ours")
    again = FlowVLA.from_pretrained(tmp_path / "ours")
    seen = observation()
    assert np.array_equal(loaded.act(seen, generator()), again.act(seen, generator()))


def test_one_command_imports_a_published_folder(published, policy, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wmgym", "import-policy", *map(str, words)])
        cli.main()

    (published / CONFIG).write_text('{"model_type": "openvla"}')
    with pytest.raises(CheckpointError, match=r"wmgym import-policy .*published OUT"):
        FlowVLA.from_pretrained(published)
    load = functools.partial(load_published, config=policy.config)
    monkeypatch.setattr(released, "load_published", load)
    out = tmp_path / "ours"
    run(published, out)
    assert capsys.readouterr().out == f"imported {out}\n"
    seen = observation()
    imported, read = FlowVLA.from_pretrained(out), load(published)
    assert np.array_equal(imported.act(seen, generator()), read.act(seen, generator()))
    for words, said in (
        ((published, out), "exists: choose another folder"),
        ((published, tmp_path / "new", "--suite", "libero_10"), "suite='libero_10'"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(*words)


def test_a_sigma_net_is_loaded_where_there_is_one(published, policy):
    table = published_head(policy)["sigma_net"]
    torch.save(table, published / "sigma_net--400_checkpoint.pt")
    loaded = small.policy(policy.config)
    load_published_head(loaded, published)
    weight = loaded.head.sigma_net.x_embedder.weight
    assert weight.equal(table["std_predictor.dit.x_embedder.weight"])
    torch.save(
        table | {"log_std_max": torch.tensor(0.0)}, published / "sigma_net--400_checkpoint.pt"
    )
    with pytest.raises(CheckpointError, match=r"log_std_max=0.0000, the policy's head.sigma"):
        load_published_head(loaded, published)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


HEAD = "action_head--150000_checkpoint.pt"
PROJECTOR = "proprio_projector--150000_checkpoint.pt"
SHARD = "model-00002-of-00002.safetensors"


def _resave(path, change):
    kept = path.suffix == ".safetensors"
    table = load_file(path) if kept else torch.load(path, weights_only=True)
    change(table)
    (save_file if kept else torch.save)(table, path)


def _without_last(table):
    del table[max(table)]


def _longer(table):
    name = next(name for name, t in table.items() if t.ndim == 1)
    table[name] = torch.zeros(5)


def _broken(table):
    next(iter(table.values())).view(-1)[0] = torch.nan


def _halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _extra(table):
    table["module.extra"] = torch.zeros(2)


SPOILED = {
    "missing key": (lambda f: _resave(f / PROJECTOR, _without_last), r"missing \['fc2.weight'\]"),
    "unknown key": (lambda f: _resave(f / HEAD, _extra), r"unknown \['extra'\]"),
    "other shape": (lambda f: _resave(f / HEAD, _longer), r"\(5,\) instead of \(16,\)"),
    "not finite": (lambda f: _resave(f / HEAD, _broken), "NaN or infinity"),
    "truncated": (lambda f: _halved(f / PROJECTOR), "damaged, truncated, or more than tensors"),
    "empty": (lambda f: (f / PROJECTOR).write_bytes(b""), "damaged, truncated"),
    "text": (lambda f: (f / PROJECTOR).write_text("<html>"), "damaged, truncated"),
    "a list": (lambda f: torch.save([torch.zeros(2)], f / HEAD), "not a table of tensors"),
    "nested": (lambda f: torch.save({"state": {}}, f / HEAD), "not a table of tensors"),
    "no head": (lambda f: (f / HEAD).unlink(), r"has \[\] for action_head"),
    "two heads": (
        lambda f: shutil.copy(f / HEAD, f / "action_head--5_checkpoint.pt"),
        "action_head--150000_checkpoint.pt', 'action_head--5_checkpoint.pt'",
    ),
    "backbone missing key": (
        lambda f: _resave(f / SHARD, _without_last),
        r"missing \['vision_backbone\.fused_featurizer\.",
    ),
    "backbone unknown key": (
        lambda f: _resave(f / SHARD, _extra),
        r"unknown \['module.extra'\]",
    ),
    "backbone truncated": (lambda f: _halved(f / SHARD), "damaged or truncated"),
    "backbone half": (lambda f: (f / SHARD).unlink(), r"does not fit its config: missing"),
    "backbone twice": (
        lambda f: shutil.copy(f / SHARD, f / "model.safetensors"),
        "as does a file before it",
    ),
    "no backbone": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        r"has no model\*.safetensors",
    ),
    "no statistics": (lambda f: (f / STATISTICS).unlink(), f"no statistics for suite='{SUITE}'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_published_files_that_do_not_fit_are_refused(case, published, policy):
    spoil, said = SPOILED[case]
    spoil(published)
    with pytest.raises(CheckpointError, match=said):
        load_published(published, SUITE, policy.config)


def test_a_refused_file_changes_nothing_and_runs_nothing(published, policy, tmp_path):
    harm = pickle.dumps(_Harmful(tmp_path / "harm"), protocol=2)
    (published / PROJECTOR).write_bytes(harm)
    torch.save(_Harmful(tmp_path / "harm"), published / HEAD)
    loaded = small.policy(policy.config)
    before = {name: t.clone() for name, t in loaded.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{HEAD} is damaged, truncated, or more than"):
        load_published_head(loaded, published)
    torch.save(published_head(policy)["action_head"], published / HEAD)
    with pytest.raises(CheckpointError, match=f"{PROJECTOR} is damaged, truncated, or more than"):
        load_published_head(loaded, published)
    _resave(published / SHARD, _extra)
    with pytest.raises(CheckpointError, match="unknown"):
        load_published_backbone(loaded, published)
    assert all(t.equal(before[name]) for name, t in loaded.state_dict().items())
    assert not (tmp_path / "harm").exists()


def test_other_presets_have_no_such_backbone(published, policy, tmp_path):
    with pytest.raises(ValueError, match="PRESETS"):
        load_published_backbone(small.policy(), published)
    with pytest.raises(ValueError, match="PRESETS"):
        load_published(published, SUITE, small.CONFIG)
    policy.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        FlowVLA.from_pretrained(tmp_path / "ours")
