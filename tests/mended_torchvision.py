"""Makes torchvision importable where it was built for another torch; import this first."""

from __future__ import annotations

import importlib
import sys

import torch


def _mend_torchvision():
    """On a torch without CUDA, the common torchvision lacks two operators that nobody here needs.

    Returns:
        The library that declares them, to be kept, or None where nothing is wrong.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library
    return None


LIBRARY = _mend_torchvision()
