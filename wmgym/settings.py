"""What a run is configured by: numbers that are checked, and values that can be written down."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType
from typing import Any


def check_numbers(config: Any, rule: str, *names: str) -> None:
    """Checks fields of a configuration; one that may be None is left aside when it is.

    Args:
        config: The configuration.
        rule: What holds for each of them: `">= 1"` or `"> 0"`, with any number.
        *names: The fields.

    Raises:
        ValueError: A field breaks the rule, is NaN or infinite, or is no integer where it is to be
            one.
    """
    sign, bound = rule.split()
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name in names:
        value, least = getattr(config, name), float(bound)
        if value is None and kinds.get(name, "").endswith("| None"):
            continue
        if kinds.get(name, "").startswith("int") and type(value) is not int:
            raise ValueError(f"{name}={value!r}: must be a Python int {rule}")
        if not (least < value < math.inf or (sign == ">=" and value == least)):
            raise ValueError(f"{name}={value}: must be {rule} and finite")


def check_choices(config: Any, **allowed: Iterable[Any]) -> None:
    """Checks fields that have a few values, or that hold some of a few, at least one, each once.

    Args:
        config: The configuration.
        **allowed: What a field may be; where it is a tuple, what may be in it.

    Raises:
        ValueError: A field is, or holds, something else, nothing, or something twice.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name, choices in allowed.items():
        value, possible = getattr(config, name), list(choices)
        if kinds[name].startswith("tuple"):
            check_distinct(config, name)
            if any(one not in possible for one in value):
                raise ValueError(f"{name}={value!r}: allowed are some of {possible}")
        elif value not in possible:
            raise ValueError(f"{name}={value!r}: allowed are {possible}")


def check_distinct(config: Any, *names: str) -> None:
    """Checks fields that are tuples with something in them, nothing twice; None is left aside.

    Raises:
        ValueError: A field is no tuple, empty, or holds something twice.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not isinstance(value, tuple) or not value or len(set(value)) < len(value):
            raise ValueError(f"{name}={value!r}: must be a tuple of at least one, and none twice")


def described(value: Any) -> Any:
    """A value as JSON: functions as `module:function`, other objects by their class.

    Functions that have no name to be found by, such as lambdas, bear a digest of their code and of
    the plain values they enclose.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [described(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}:{named.__qualname__}"
    code = getattr(value, "__code__", None)
    if code is None or "<" not in name:
        return name
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    kept = [described(cell) for cell in cells if not callable(cell)]
    said = repr((_code(code), kept, value.__defaults__)).encode()
    return f"{name}#{hashlib.sha256(said).hexdigest()[:8]}"


def _code(value: Any) -> Any:
    """What a function's code says, the same in every process."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_code(constant) for constant in value.co_consts]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


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
