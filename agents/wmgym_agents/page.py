"""Evaluations and comparisons as one page of HTML each: figures, intervals, protocol and films."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmgym_agents.statistics import Rate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1c1e21; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td { white-space: nowrap; font-variant-numeric: tabular-nums }
td:first-child { white-space: normal; min-width: 9rem }
td.number { text-align: right }
.scale { position: relative; width: 10rem; height: 1rem; background: #f0f1f3 }
.range { position: absolute; height: 100%; background: #bcd3ee }
.point { position: absolute; width: 3px; height: 100%; background: #1f5fa8 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { color: #666 }
dd { margin: 0; overflow-wrap: anywhere }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; width: 24rem; max-width: 100% }
video { width: 100%; display: block }
footer { color: #666; font-size: 13px; margin-top: 2rem; overflow-wrap: anywhere }
"""
_PROTOCOL = {
    "policy": "policy",
    "weights": "digest of its weights",
    "temperature": "temperature of its noise",
    "image_size": "image size, pixels",
    "fast_rendering": "simplified rendering",
    "physics": "versions of the physics",
    "chunk": "actions per look",
    "max_steps": "step limit",
    "seed": "seed",
    "seconds_per_episode": "seconds per episode, median",
}
_UNSAID = {
    "weights": "unknown: a function makes the policy",
    "max_steps": "the suite's published one",
}


def _document(title: str, parts: Sequence[str], report: Mapping[str, Any]) -> str:
    """A page of parts, with where its figures come from at its end."""
    origin = "; ".join(f"{k}: {report[k]}" for k in ("command", "seed", "machine", "version"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<footer>{html.escape(origin)}</footer>\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _rates(head: str, rates: Mapping[str, Rate]) -> str:
    rows = []
    for name, rate in rates.items():
        share = rate["successes"] / max(1, rate["episodes"])
        low, high = rate["interval"]
        rows.append(
            f"<td>{html.escape(name)}</td>"
            f'<td class="number">{100 * share:.1f} %</td>'
            f'<td class="number">{100 * low:.1f} ... {100 * high:.1f}</td>'
            f'<td class="number">{rate["successes"]} / {rate["episodes"]}</td>'
            f'<td><div class="scale"><div class="range" style="left:{100 * low:.1f}%;'
            f'width:{100 * (high - low):.1f}%"></div><div class="point" '
            f'style="left:calc({100 * share:.1f}% - 1px)"></div></div></td>'
        )
    return _table((head, "success", "95 % interval", "episodes", "0 ... 100 %"), rows)


def evaluation_page(report: Mapping[str, Any], films: Mapping[Path, str]) -> str:
    """The page of an evaluation.

    Args:
        report: `suite`, the protocol, `instructions` by task, `settings` as `evaluate.summary`
            gives them, and what `wmgym.reports.write_report` adds.
        films: Captions of films of failed episodes, by paths relative to the page.
    """
    settings = report["settings"]
    facts = [
        f"<dt>{name}</dt><dd>{html.escape(_plain(key, report.get(key)))}</dd>"
        for key, name in _PROTOCOL.items()
    ]
    parts = [_rates("setting", settings), "<dl>", *facts, "</dl>"]
    for name, rate in settings.items():
        tasks = {f"{task}: {report['instructions'][task]}": r for task, r in rate["tasks"].items()}
        parts += [f"<h2>{html.escape(name)}</h2>", _rates("task", tasks)]
        if rate["errors"]:
            parts.append(f"<p>{rate['errors']} of the failures are episodes that broke off.</p>")
    if films:
        parts.append("<h2>Some failures</h2>")
    parts += [
        f'<figure><video src="{html.escape(path.as_posix())}" controls muted loop></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in films.items()
    ]
    return _document(f"Success in {report['suite']}", parts, report)


def comparison_page(report: Mapping[str, Any], cells: Sequence[Sequence[str]]) -> str:
    """The page of a comparison.

    Args:
        report: `policies` by name, `methods`, and what `wmgym.reports.write_report` adds.
        cells: The table, row by row, its head first.
    """
    head, *rows = cells
    policies = {
        name: "; ".join(f"{_PROTOCOL[key]}: {_plain(key, value)}" for key, value in facts.items())
        for name, facts in report["policies"].items()
    }
    parts = [
        _table(head, ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]),
        "<dl>",
        *(f"<dt>{html.escape(n)}</dt><dd>{html.escape(p)}</dd>" for n, p in policies.items()),
        "</dl>",
        f"<p>{html.escape(report['methods'])}</p>",
    ]
    return _document(f"Policies in {', '.join(report['suites'])}", parts, report)


def _plain(name: str, value: Any) -> str:
    """A fact of the protocol in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _UNSAID.get(name, "unknown") if value is None else str(value)
