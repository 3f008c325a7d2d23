"""An evaluation as one page of HTML: rates with their intervals, by setting and task, and films."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmgym_agents.statistics import Rate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1c1e21; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.scale { position: relative; width: 16rem; height: 1rem; background: #f0f1f3 }
.range { position: absolute; height: 100%; background: #bcd3ee }
.point { position: absolute; width: 3px; height: 100%; background: #1f5fa8 }
figure { display: inline-block; margin: .5rem 1rem .5rem 0 }
video { width: 16rem; display: block; image-rendering: pixelated }
footer { color: #666; font-size: 13px; margin-top: 2rem }
"""


def _row(name: str, rate: Rate) -> str:
    share = rate["successes"] / max(1, rate["episodes"])
    low, high = rate["interval"]
    return (
        f"<tr><td>{html.escape(name)}</td>"
        f'<td class="number">{100 * share:.1f} %</td>'
        f'<td class="number">{100 * low:.1f} - {100 * high:.1f}</td>'
        f'<td class="number">{rate["successes"]} / {rate["episodes"]}</td>'
        f'<td><div class="scale"><div class="range" style="left:{100 * low:.1f}%;'
        f'width:{100 * (high - low):.1f}%"></div><div class="point" '
        f'style="left:calc({100 * share:.1f}% - 1px)"></div></div></td></tr>'
    )


def _table(head: str, rows: Sequence[str]) -> str:
    titles = (head, "success", "95 % interval", "episodes", "0 ... 100 %")
    cells = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def page(report: dict[str, Any], videos: Sequence[Path]) -> str:
    """The page of a report.

    Args:
        report: `policy`, `suite`, `instructions` by task, `settings` as `evaluate.summary` gives
            them, and what `wmgym.reports.write_report` adds.
        videos: Films, as paths relative to the page.
    """
    settings = report["settings"]
    title = f"{report['policy']} on {report['suite']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table("setting", [_row(name, rate) for name, rate in settings.items()]),
    ]
    for name, rate in settings.items():
        rows = [
            _row(f"{task}: {report['instructions'][task]}", one)
            for task, one in rate["tasks"].items()
        ]
        parts += [f"<h2>{html.escape(name)}</h2>", _table("task", rows)]
    if videos:
        parts.append("<h2>Failures</h2>")
    for video in videos:
        source, caption = html.escape(video.as_posix()), html.escape(video.stem)
        parts.append(
            f'<figure><video src="{source}" controls muted loop></video>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    origin = ", ".join(f"{k}: {report[k]}" for k in ("command", "seed", "machine", "version"))
    parts.append(f"<footer>{html.escape(origin)}</footer>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
