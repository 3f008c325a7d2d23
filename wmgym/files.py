"""Files that bear a killed process: complete or not there, or complete line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def complete(path: Path, *refusals: type[Exception]) -> Iterator[Path]:
    """Where to write a file that appears complete or not at all.

    Args:
        path: The file. Until the block has ended it is called `<name>.part`; where the block fails
            that is removed, and what was at `path` before stays.
        *refusals: What a library raises when it cannot write.

    Raises:
        OSError: It cannot be written; the message names the file.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        nameless = isinstance(error, OSError) and error.filename is None
        if nameless or isinstance(error, refusals):
            reason = f"{error}".partition("\n")[0]
            raise OSError(f"{path} cannot be written, is the disk full? ({reason})") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    with complete(path) as part:
        part.write_text(text, encoding="utf-8")


def check_own(folder: Path, marker: str) -> None:
    """Keeps a folder that is to be filled, and then removed, from being anyone else's.

    Args:
        folder: It need not exist.
        marker: Name of the file that was the first to be written into our own.

    Raises:
        FileExistsError: It holds something, but no such file.
    """
    inside = sorted(path.name for path in folder.glob("*"))
    if inside and not {marker, f"{marker}.part"}.intersection(inside):
        raise FileExistsError(
            f"{folder} holds {inside[:8]} and no {marker}, so it is of something else; remove it "
            "or choose another folder"
        )


def complete_lines(path: Path) -> list[str]:
    """Lines, with their ends, of a file that is appended to; a killed write leaves half a line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that is appended to, one a line.

    Raises:
        ValueError: A complete line is none; the message says which.
    """
    entries = []
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path}, line {number} is damaged: it is no JSON object. Remove that line, and "
                "what it told is done again"
            )
        entries.append(entry)
    return entries
