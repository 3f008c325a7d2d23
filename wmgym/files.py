"""Text files that bear a killed process: complete or not there, or complete line by line."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def complete_lines(path: Path) -> list[str]:
    """Lines, with their ends, of a file that is appended to; a killed write leaves half a line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
