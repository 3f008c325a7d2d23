"""Worlds on disk: what is saved comes back, and whatever is wrong is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from toy import ToyDataset

from wmgym import checkpoints
from wmgym.checkpoints import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    model_folder,
    read_config,
    shipped,
)
from wmgym.envs.resources import contents_of
from wmgym.worlds.checkpoints import FAMILY, load_model, load_world, save_world
from wmgym.worlds.world import World


@pytest.fixture
def folder(tiny_world: Path, tmp_path: Path) -> Path:
    """A world to be damaged."""
    return Path(shutil.copytree(tiny_world, tmp_path / "broken"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["world"]["tokenizer"].update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_round_trip_is_exact(tmp_path):
    model = tiny.model(seed=3)
    model.dynamics.get_buffer("proprio_mean").fill_(0.7)
    save_world(tmp_path / "deep" / "world", model, note="how it was made")
    loaded = load_model(tmp_path / "deep" / "world")
    assert loaded.config == model.config
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert tensor.dtype == states[1][name].dtype
    assert read_config(tmp_path / "deep" / "world", "world", FAMILY)["note"] == "how it was made"


def test_half_rounds_matrices_to_bfloat16_and_keeps_the_rest(tmp_path):
    model = tiny.model()
    save_world(tmp_path / "whole", model)
    save_world(tmp_path / "half", model, half=True)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    for name, tensor in load_model(tmp_path / "half").state_dict().items():
        expected = model.state_dict()[name]
        if expected.ndim > 1:
            expected = expected.bfloat16().float()
        assert torch.equal(tensor, expected), name


def test_saving_again_replaces_and_leaves_no_parts(tmp_path):
    for seed in (0, 1):
        save_world(tmp_path, tiny.model(seed=seed))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in tiny.model(seed=1).state_dict().items())


def test_an_interrupted_save_leaves_the_old_world(tmp_path, monkeypatch):
    save_world(tmp_path, tiny.model(seed=0))

    def dies(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        save_world(tmp_path, tiny.model(seed=1))
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in tiny.model(seed=0).state_dict().items())


def test_a_loaded_world_imagines_what_was_saved(tiny_world):
    world = load_world(tiny_world)
    assert isinstance(world, World)
    assert world.name == "tiny"
    frames, proprio, actions = tiny.rows(2, 3)
    results = [w.step(w.start(frames, proprio), actions)[1] for w in (world, tiny.world())]
    assert torch.equal(results[0].frames, results[1].frames)


def test_contents_decide_the_digest(tiny_world, tiny_dataset, tmp_path):
    world = shutil.copytree(tiny_world, tmp_path / "world")
    before = contents_of(world, tiny_dataset, "libero_object")
    assert before == contents_of(str(tiny_world), tiny_dataset, "libero_object")
    weights = load_file(world / WEIGHTS)
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, world / WEIGHTS)
    now = contents_of(world, None, "libero_object")
    assert now.keys() == before.keys() == {"world_digest", "data_fingerprint"}
    assert all(now[name] != before[name] for name in now)
    assert contents_of(load_world(world), ToyDataset(), "libero_object") == {}


def test_unknown_names_list_what_ships(tmp_path):
    with pytest.raises(CheckpointError, match="no-such-world") as error:
        load_world("no-such-world")
    assert str(shipped("world")) in str(error.value)
    with pytest.raises(CheckpointError, match="neither"):
        model_folder("world", tmp_path / "absent")


def test_without_shipped_worlds_none_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "asset_path", tmp_path.joinpath)
    assert shipped("world") == []
    with pytest.raises(CheckpointError, match=r"\[\]"):
        model_folder("world", "libero-small")


@pytest.mark.parametrize("name", shipped("world"))
def test_shipped_worlds_load(name):
    world = load_world(name)
    assert world.name == name
    height, width = world.image_size
    state = world.start(torch.zeros(1, 2, 3, height, width), torch.zeros(1, 2, 8))
    assert torch.isfinite(world.step(state, torch.zeros(1, 1, 7))[1].frames).all()


# --- damage -------------------------------------------------------------------------------------


def test_a_folder_without_config_is_no_world(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*no {CONFIG}"):
        load_model(tmp_path)


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated_weights(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged or truncated"):
        load_model(folder)


def test_weights_that_are_something_else(folder):
    torch.save({"a": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", '{"family": "wmgym-latent-world"'])
def test_config_that_is_not_json(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=f"{CONFIG} is damaged"):
        load_model(folder)


def test_config_that_is_not_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=f"{CONFIG} is damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no family"),
        ({"family": "other"}, "family='other'"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'"),
    ],
)
def test_another_family(folder, config, said):
    (folder / CONFIG).write_text(json.dumps(config))
    supported = "supported is family='wmgym-latent-world'; .* the published layout"
    with pytest.raises(CheckpointError, match=f"says {said}; {supported}, model_type='llama'"):
        load_model(folder)


@pytest.mark.parametrize("config", [[], "world"])
def test_config_that_is_no_object(folder, config):
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{CONFIG} holds {type(config).__name__}, expected"):
        load_model(folder)


def test_a_folder_in_the_place_of_weights_is_named(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} cannot be read"):
        load_model(folder)


def test_weights_in_several_files_are_not_read(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing, and the several files .*one"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": 3}, "colour"),
        ({"image_size": 33}, "image_size=33"),
        ({"image_size": "32"}, CONFIG),
        ({"patch": 0}, CONFIG),
        ({"width": 30, "heads": 4}, "heads=4"),
        ({"width": -32}, CONFIG),
        ({"heads": 0}, CONFIG),
        ({"width": None}, CONFIG),
    ],
)
def test_a_shape_that_no_world_has(folder, changes, named):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        load_model(folder)


@pytest.mark.parametrize("world", [None, {}, {"tokenizer": {}}, {"tokenizer": 1, "dynamics": 2}])
def test_a_config_without_a_shape(folder, world):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "world": world}))
    with pytest.raises(CheckpointError, match="does not describe a world"):
        load_model(folder)


def test_a_missing_and_an_unknown_tensor_are_named(folder):
    edit_weights(folder, lambda t: t.update(extra=t.pop("tokenizer.embed.bias")))
    with pytest.raises(CheckpointError, match=r"missing \['tokenizer.embed.bias'\]") as error:
        load_model(folder)
    assert "unknown ['extra']" in str(error.value)


def test_a_tensor_of_another_shape_is_named(folder):
    edit_weights(folder, lambda t: t.update({"tokenizer.embed.bias": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=r"tokenizer.embed.bias: \(5,\) instead of \(16,\)"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(folder, value):
    edit_weights(folder, lambda t: t["tokenizer.embed.bias"][3:4].fill_(value))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in \['tokenizer.embed.bias'\]"):
        load_model(folder)


def test_weights_of_another_shape_than_the_config_says(folder):
    edit_config(folder, slots=3)
    with pytest.raises(CheckpointError, match=r"tokenizer.slots: \(2, 32\) instead of \(3, 32\)"):
        load_model(folder)
