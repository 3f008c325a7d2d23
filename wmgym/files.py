"""Text files that bear a killed process: complete or not there, or complete line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


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
