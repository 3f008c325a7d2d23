"""What a run is configured by: numbers that are checked, and values that can be written down."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_numbers(config: Any, rule: str, *names: str) -> None:
    """Checks fields of a configuration.

    Args:
        config: The configuration.
        rule: What holds for each of them: `">= 1"` or `"> 0"`, with any number.
        *names: The fields.

    Raises:
        ValueError: A field breaks the rule, or is NaN or infinite.
    """
    sign, bound = rule.split()
    for name in names:
        value, least = getattr(config, name), float(bound)
        if not (least < value < math.inf or (sign == ">=" and value == least)):
            raise ValueError(f"{name}={value}: must be {rule} and finite")


def described(value: Any) -> Any:
    """A value as JSON: functions as `module:function`, other objects by their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [described(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def function_of(name: str) -> Callable[..., Any]:
    """The function `module:function`.

    Modules are also looked for in the working directory.

    Raises:
        ValueError: There is none.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()  # noqa: PTH109 - as it stands on Python's path
    if here not in sys.path:  # an installed command's path lacks it
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no function ({error}): give module:function") from error
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}: give module:function")
    return found
