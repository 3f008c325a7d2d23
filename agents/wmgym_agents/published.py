"""Files of the released VLA-RFT into a `FlowVLA` of the preset `vla-adapter`.

A published folder (`VLA-RFT/Base-Libero-*`, `openvla` format) holds the backbone as
`model*.safetensors`, `dataset_statistics.json`, the tokenizer, and one file each of
`action_head--<step>_checkpoint.pt`, `noisy_action_projector--...` and `proprio_projector--...`;
RFT writes the same three. Every tensor must be used and every weight present, a file that is not
plain tensors is refused unread, and a policy that something is missing for stays as it was. Two
things in these files have no place here and are left out: the output layer of the language model,
which nothing reads, and the bounds of a sigma-net, which must be those of the configuration.

The published code neither publishes nor saves a sigma-net. Where a file `sigma_net--...` is there
it is loaded, otherwise the policy keeps its own, which starts at the same sigma everywhere.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wmgym.checkpoints import CheckpointError, check_fit
from wmgym.data.statistics import Statistics
from wmgym_agents.policy import PRESETS, STATISTICS, FlowVLA, PolicyConfig
from wmgym_agents.vla_adapter import VLAAdapterConfig, VLAAdapterEncoder

_HEAD_PREFIXES = {
    "action_head": "flow_predictor.dit.",
    "noisy_action_projector": "",
    "proprio_projector": "",
    "sigma_net": "std_predictor.dit.",
}
_OPTIONAL = "sigma_net"
_BACKBONE_PREFIXES = {
    "dino.vit.": "vision_backbone.featurizer.",
    "siglip.vit.": "vision_backbone.fused_featurizer.",
    "language.": "language_model.model.",
}
_OUTPUT_LAYER = "language_model.lm_head.weight"


def load_published(
    folder: str | Path, suite: str | None = None, config: PolicyConfig = PRESETS["vla-adapter"]
) -> FlowVLA:
    """A policy out of a published folder, on the CPU, in evaluation mode.

    `wmgym import-policy` saves it as a folder that `FlowVLA.from_pretrained` loads.

    Args:
        folder: The folder, tokenizer included.
        suite: Whose statistics to use, such as "libero_object_no_noops"; None if the folder has
            those of one only.
        config: Shape of the policy; its tokenizer is replaced by the folder's.

    Raises:
        CheckpointError: Something is missing or damaged, or does not fit the shape.
        ValueError: The shape is not one of a `VLAAdapterEncoder`.
    """
    folder = Path(folder)
    if not isinstance(config.encoder, VLAAdapterConfig):
        raise ValueError("config.encoder must be a VLAAdapterConfig, as in PRESETS['vla-adapter']")
    try:
        statistics = Statistics.load(folder / STATISTICS, suite)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / STATISTICS} has no statistics for suite={suite!r}: {error}"
        ) from None
    encoder = dataclasses.replace(config.encoder, tokenizer=str(folder), download=False)
    with torch.random.fork_rng(devices=[]):
        policy = FlowVLA(dataclasses.replace(config, encoder=encoder), statistics)
    assert isinstance(policy.encoder, VLAAdapterEncoder)
    policy.encoder.tokenizer()
    load_published_backbone(policy, folder)
    load_published_head(policy, folder)
    return policy.eval()


def load_published_head(policy: FlowVLA, folder: str | Path) -> None:
    """Fills flow head and projectors from the three files of a published or RFT folder.

    Raises:
        CheckpointError: A file is missing, there twice, damaged, or does not fit.
    """
    folder = Path(folder)
    filled: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for module, prefix in _HEAD_PREFIXES.items():
        paths = sorted(path for path in folder.glob(f"*{module}*checkpoint*") if path.is_file())
        if module == _OPTIONAL and not paths:
            continue
        if len(paths) != 1:
            raise CheckpointError(
                f"{folder} has {[path.name for path in paths]} for {module}: one file "
                f"{module}--<step>_checkpoint.pt is needed"
            )
        tensors = _state_dict(paths[0])
        if module == _OPTIONAL:
            _check_bounds(tensors, policy.head.config.sigma, paths[0])
        weights = policy.head.get_submodule(module).state_dict()
        expected = {f"{prefix}{name}": weight for name, weight in weights.items()}
        check_fit(expected, tensors, str(paths[0]))
        filled[module] = expected, tensors
    for expected, tensors in filled.values():
        _fill(expected, tensors)


def load_published_backbone(policy: FlowVLA, folder: str | Path) -> None:
    """Fills the encoder from the `model*.safetensors` of a published folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the files do not fit.
        ValueError: The policy's encoder is not a `VLAAdapterEncoder`.
    """
    folder = Path(folder)
    if not isinstance(policy.encoder, VLAAdapterEncoder):
        raise ValueError("the policy has no such backbone: make it with PRESETS['vla-adapter']")
    tensors: dict[str, Tensor] = {}
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} has no model*.safetensors")
    for shard in shards:
        try:
            loaded = load_file(shard)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is damaged or truncated: {error}") from None
        twice = sorted(tensors.keys() & loaded.keys())
        if twice:
            raise CheckpointError(f"{shard} has {twice[:5]}, as does a file before it")
        tensors |= loaded
    tensors.pop(_OUTPUT_LAYER, None)
    weights = policy.encoder.state_dict()
    expected = {_published_name(name): weight for name, weight in weights.items()}
    check_fit(expected, tensors, f"{folder}/model*.safetensors")
    _fill(expected, tensors)


def _published_name(name: str) -> str:
    for ours, theirs in _BACKBONE_PREFIXES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    if name.endswith(".gamma"):  # of LayerScale
        return name.removesuffix("gamma") + "scale_factor"
    return name


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` file by name, without the prefix of a module in several processes."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        raise CheckpointError(f"{path} is damaged, truncated, or more than tensors") from None
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise CheckpointError(f"{path} is not a table of tensors by name")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _check_bounds(tensors: dict[str, Tensor], sigma: tuple[float, float], path: Path) -> None:
    """Takes the bounds of a sigma-net out of its tensors; they must be those of the policy."""
    for name, bound in zip(("log_std_min", "log_std_max"), sigma, strict=True):
        if name not in tensors or tensors[name].numel() != 1:
            continue
        value = tensors.pop(name)
        if not math.isclose(float(value.exp()), bound, rel_tol=1e-2):
            raise CheckpointError(
                f"{path} has {name}={float(value):.4f}, the policy's head.sigma={sigma} says "
                f"{math.log(bound):.4f}"
            )


@torch.no_grad()
def _fill(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(tensors[name])
