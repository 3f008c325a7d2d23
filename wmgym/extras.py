"""Optional dependencies, imported where they are used.

Heavy packages are extras of the distribution. Code that needs one calls `require`, so that a
missing package ends in one sentence that names the line to type, not in a bare ImportError.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: Dotted name to import, for example `"stable_baselines3"`.
        extra: The extra of wmgym that installs it, for example `"sb3"`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module's top-level package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"'{module}' is not installed. Install it with: pip install 'wmgym[{extra}]'"
        ) from error


def keep_tensorflow_out() -> None:
    """Keeps TensorBoard from loading TensorFlow, which it does where that is installed.

    It needs nothing of it, and the LLVM that TensorFlow brings crashes the simulator's software
    renderer in the same process. TensorBoard looks for a module of this name.
    """
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, ModuleType(name))
