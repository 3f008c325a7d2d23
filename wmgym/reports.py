"""Reports: JSON files beside what they describe.

Every report names the command that made it, the seed, the machine and the version, so that whoever
doubts a figure can ask for it again.
"""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

import wmgym
from wmgym.files import write_text


def machine() -> str:
    """The machine in one line: processor, cores, memory, accelerator, Python and PyTorch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        _processor(),
        f"{os.cpu_count()} cores",
        f"{memory:.0f} GiB",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_report(path: str | Path, figures: dict[str, Any], *, command: str, seed: int) -> None:
    """Writes figures with where they come from; the file appears complete or not at all.

    Args:
        path: The JSON file; its folder is made if missing.
        figures: JSON values; NaN and infinities, which JSON lacks, are written as null.
        command: The line that makes this report.
        seed: The seed it was made with.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {
        "command": command,
        "seed": seed,
        "machine": machine(),
        "version": wmgym.__version__,
    }
    write_text(path, json.dumps(_finite({**figures, **origin}), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON values with None for NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quality_table(folder: str | Path) -> str:
    """Markdown table of a world's `report.json`: the world between its two bounds, by dataset."""
    report = json.loads((Path(folder) / "report.json").read_text())
    rows = [
        "| held-out windows of | frames | PSNR (dB) | SSIM | LPIPS | MSE |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    names = {"": "imagined", "copy_": "copy of the context frame", "tokenizer_": "tokenizer's own"}
    for dataset, scores in report["datasets"].items():
        for prefix, name in names.items():
            rows.append(
                f"| {dataset} | {name} | {scores[prefix + 'psnr']:.2f} | "
                f"{scores[prefix + 'ssim']:.3f} | {scores[prefix + 'lpips']:.3f} | "
                f"{scores[prefix + 'mse']:.5f} |"
            )
    return "\n".join(rows)


def audit_table(folder: str | Path) -> str:
    """Markdown table of a world's `audit.json`."""
    report = json.loads((Path(folder) / "audit.json").read_text())
    rows = (
        ("Spearman of imagined and real R3, all chunks", _shown(report["spearman_r3"])),
        ("the same within a start, mean", _shown(report["spearman_r3_within"])),
        ("Spearman of imagined R2 and real R3", _shown(report["spearman_r2"])),
        ("Spearman of imagined R3 and gripper displacement", _shown(report["spearman_tip"])),
        (
            f"Spearman of imagined R3 and object displacement "
            f"({report['n_object_chunks']} chunks that move one)",
            _shown(report["spearman_object"]),
        ),
        ("pairs of chunks of one start ordered wrongly", f"{100 * report['pairs_wrong']:.1f} %"),
    )
    head = f"| {report['n_chunks']} chunks from {report['n_starts']} held-out starts | |"
    return "\n".join([head, "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _shown(figure: float | None) -> str:
    return "undefined" if figure is None else f"{figure:.3f}"


def published_table(path: str | Path) -> str:
    """Markdown table of `wmgym bench-published`: seconds to rewards and what they go into."""
    report = json.loads(Path(path).read_text())
    names = {
        "ours": "wmgym",
        "generate": "`generate`, cache kept",
        "reprefill": "`generate`, prompt passed again for every frame",
    }
    lines = [
        "| one start, members and their reference | seconds to R3 | generating | drawing "
        "| tokens per second | peak GiB | wmgym is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device in ("cpu", "cuda"):
        for dtype, told in report.get(device, {}).items():
            size = f"{told['members']} x {told['frames']} frames"
            for name, way in told["ways"].items():
                ratio = told.get(f"speedup_vs_{name}")
                only = told.get(f"generation_speedup_vs_{name}")
                shown = "" if ratio is None else f"{ratio:.1f} (generating {only:.1f})"
                lines.append(
                    f"| {device}, {dtype}, {size}: {names[name]} | {way['total']:.1f} | "
                    f"{way['generation']:.1f} | {way['drawing']:.1f} | {way['tokens_per_s']:.0f} | "
                    f"{way['peak_memory_gib']:.1f} | {shown} |"
                )
    return "\n".join(lines)


def memory_table(path: str | Path) -> str:
    """Markdown table of the memory that environments of the published world take."""
    report = json.loads(Path(path).read_text())
    columns = {
        f"{device}, {dtype}": told["memory_gib"]
        for device in ("cpu", "cuda")
        for dtype, told in report.get(device, {}).items()
    }
    counts = next(iter(columns.values()))
    lines = [f"| environments | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for count in counts:
        values = (f"{column[count]:.1f} GiB" for column in columns.values())
        lines.append(f"| {count} | {' | '.join(values)} |")
    return "\n".join(lines)


def speed_table(path: str | Path) -> str:
    """Markdown table of a benchmark report."""
    report = json.loads(Path(path).read_text())
    split = ", ".join(f"{name} {100 * share:.0f} %" for name, share in report["split"].items())
    rows = (
        (
            f"imagined, {report['num_envs']} environments, R3 and pixels",
            report["imagined_steps_per_s"],
        ),
        ("`LIBERO-v0`, one camera, 128 px", report["libero_steps_per_s"]),
        ("`LIBERO-v0`, the same with `fast_rendering`", report["libero_fast_steps_per_s"]),
    )
    lines = [f"| control steps per second | {report['machine']} |", "| --- | --- |"]
    lines += [f"| {name} | {value:.1f} |" for name, value in rows]
    fast = report["imagined_steps_per_s"] / report["libero_fast_steps_per_s"]
    lines += [
        f"| imagined, to one `LIBERO-v0` | {report['ratio']:.1f} times, {fast:.1f} the fast one |",
        f"| an imagined step is | {split} |",
    ]
    return "\n".join(lines)
