"""The story of one run as one HTML file that needs nothing else: no server, no script, no network."""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from orchestrator.track.history import RunHistory

_WIDTH, _HEIGHT, _PAD = 520, 190, 34
_POINTS: Final = 400
_COLOURS: Final = ("#1f6fb4", "#d1603d", "#3a8f5c", "#8a5fb0", "#b08a1e", "#5b6b7a")
_ORDER: Final = ("train/loss", "eval/", "health/", "train/", "data/", "goodput/", "system/", "checkpoint/", "tracking/")
_UNITS: Final = {"_percentage": "%", "_mb_per_s": "MB/s", "_mb": "MB"}
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b2733;max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.1rem}h2{margin-top:2.2rem;border-bottom:1px solid #dde3e8;padding-bottom:.2rem}
.sub{color:#5b6b7a}.state{padding:.1rem .5rem;border-radius:.6rem;color:#fff;background:#5b6b7a;font-size:.85em}
.state.finished{background:#3a8f5c}.state.failed{background:#c0392b}.state.killed{background:#b08a1e}
table{border-collapse:collapse;font-size:.92em}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
th{color:#5b6b7a;font-weight:600}.charts{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}
figcaption{font-size:.85em;color:#5b6b7a}img{max-width:100%;border:1px solid #dde3e8}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}.card{border:1px solid #dde3e8;border-radius:.5rem;
padding:.5rem .9rem;min-width:8rem}.card b{display:block;font-size:1.25em}details{margin:.6rem 0}summary{cursor:pointer}
figure.chart{max-width:520px}svg text{font:11px system-ui,sans-serif;fill:#5b6b7a}pre{white-space:pre-wrap}
"""


def write_report(history: RunHistory, directory: Path, path: Path) -> None:
    """Write the report of a run.

    Args:
        history: the run.
        directory: its run directory, where its figures lie.
        path: HTML file to write.
    """
    state = history.attempts[-1].state if history.attempts else "no record"
    title = escape(history.name)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>",
        f"</head><body><h1>{title} <span class='state {escape(state)}'>{escape(state)}</span></h1>",
        f"<p class='sub'>run {escape(history.run_uid)} · {escape(_when(history))}</p>",
        _headline(history),
        _section("Purpose", _markdown(history.tags["mlflow.note.content"]))
        if history.tags.get("mlflow.note.content")
        else "",
        _section("Curves", _charts(history)),
        _section("Figures", _figures(history, directory)),
        _section("Data", _table(("use", "name", "digest", "facts", "source"), _data_rows(history))),
        _section("Attempts", _table(("attempt", "from", "to", "end", "reason"), _attempt_rows(history))),
        _section("Code and machine", _table(("", ""), sorted(_plain_tags(history).items()))),
        f"<details><summary>{len(history.params)} settings</summary>"
        f"{_table(('setting', 'value'), sorted(history.params.items()))}</details></body></html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not body:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _markdown(text: str) -> str:
    """The Markdown that our descriptions use: paragraphs, two-column tables, **bold** and `code`."""
    blocks = []
    for block in text.strip().split("\n\n"):
        rows = [line.strip().strip("|").split("|") for line in block.splitlines() if line.strip().startswith("|")]
        rows = [row for row in rows if any(cell.strip(" -:") for cell in row)]  # no rule, no empty head
        if rows:
            cells = ["".join(f"<td>{_inline(cell.strip())}</td>" for cell in row) for row in rows]
            blocks.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        else:
            blocks.append(f"<p>{_inline(block)}</p>")
    return "".join(blocks)


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _clock(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _when(history: RunHistory) -> str:
    if not history.attempts:
        return "nothing recorded"
    begun = min(attempt.begun_ms for attempt in history.attempts)
    active = sum(attempt.ended_ms - attempt.begun_ms for attempt in history.attempts) / 1000
    count = len(history.attempts)
    shown = f"{active:.0f} s" if active < 120 else f"{active / 60:.1f} min"
    return f"begun {_clock(begun)}, active {shown} in {count} attempt{'s' if count > 1 else ''}"


def _headline(history: RunHistory) -> str:
    """Loss first to last, evaluations first to last, speed."""
    cards = []
    for name in sorted(history.series):
        points = history.series[name]
        first, last = points[min(points)], points[max(points)]
        if name in {"train/loss", "eval/loss"} or (name.startswith("eval/") and len(points) > 1):
            cards.append((name, f"{first:.4g} → {last:.4g}"))
        elif name.startswith("eval/"):
            cards.append((name, f"{last:.4g}"))
        elif name == "train/images_per_second":
            middle = sorted(points.values())[len(points) // 2]
            cards.append(("images per second (median)", f"{middle:,.0f}"))
    shown = "".join(f"<div class='card'>{escape(name)}<b>{escape(value)}</b></div>" for name, value in cards[:12])
    return f"<div class='cards'>{shown}</div>" if shown else ""


def _groups(history: RunHistory) -> dict[str, list[str]]:
    """Metrics that belong in one chart: those that differ only after the last slash of three or more parts.

    The load of a host has several units, and so a chart for each.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(history.series):
        parts = name.split("/")
        group = "/".join(parts[:-1]) if len(parts) > 2 else name
        if group.startswith("system/"):
            group += next((f" ({unit})" for end, unit in _UNITS.items() if name.endswith(end)), f"/{parts[-1]}")
        if len(set(history.series[name].values())) > 1:
            groups.setdefault(group, []).append(name)
    return groups


def _place(group: str) -> tuple[int, str]:
    """Where a chart stands: what was learnt first, then how the run went, then the machine."""
    first = next((at for at, start in enumerate(_ORDER) if group.startswith(start)), len(_ORDER))
    return first, group


def _charts(history: RunHistory) -> str:
    groups = _groups(history)
    charts = [
        _chart(group, {name: history.series[name] for name in groups[group]}) for group in sorted(groups, key=_place)
    ]
    still = [
        f"{name} {next(iter(points.values())):.4g}"
        for name, points in sorted(history.series.items())
        if len(points) > 1 and len(set(points.values())) == 1
    ]
    constant = f"<p class='sub'>The same at every step: {escape(', '.join(still))}</p>" if still else ""
    return f"<div class='charts'>{''.join(charts)}</div>{constant}" if charts or still else ""


def _thin(points: dict[int, float]) -> list[tuple[int, float]]:
    """At most a few hundred finite points, the first and the last among them."""
    rows = [(step, points[step]) for step in sorted(points) if abs(points[step]) < float("inf")]
    stride = max(1, len(rows) // _POINTS)
    return rows[:-1][::stride] + rows[-1:]


def _chart(title: str, curves: dict[str, dict[int, float]]) -> str:
    thin = {name: _thin(points) for name, points in curves.items()}
    rows = [row for points in thin.values() for row in points]
    if not rows:
        return ""
    left, right = min(step for step, _ in rows), max(step for step, _ in rows)
    low, high = min(value for _, value in rows), max(value for _, value in rows)
    across = (_WIDTH - _PAD - 70) / max(right - left, 1)
    up = (_HEIGHT - 2 * _PAD) / (high - low or 1.0)
    lines, keys = [], []
    for number, (name, points) in enumerate(thin.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(
            f"{70 + (step - left) * across:.1f},{_HEIGHT - _PAD - (value - low) * up:.1f}" for step, value in points
        )
        lines.append(f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{path}'/>")
        label = name.rsplit("/", 1)[-1] if name != title else ""
        keys.append(f"<span style='color:{colour}'>■</span> {escape(label)} {points[-1][1]:.4g}" if points else "")
    base = _HEIGHT - _PAD
    return (
        f"<figure class='chart'><svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{escape(title)}'>"
        f"<path d='M70 {_PAD}V{base}H{_WIDTH - _PAD}' fill='none' stroke='#dde3e8'/>{''.join(lines)}"
        f"<text x='64' y='{_PAD + 4}' text-anchor='end'>{high:.4g}</text>"
        f"<text x='64' y='{base}' text-anchor='end'>{low:.4g}</text><text x='70' y='{base + 16}'>{left}</text>"
        f"<text x='{_WIDTH - _PAD}' y='{base + 16}' text-anchor='end'>step {right}</text></svg>"
        f"<figcaption><b>{escape(title)}</b> {' '.join(keys)}</figcaption></figure>"
    )


def _figures(history: RunHistory, directory: Path) -> str:
    """The last picture of each kind (same folder and name up to the step), inside the file."""
    latest: dict[str, Path] = {}
    for artifact in history.artifacts:
        path = directory / artifact.path
        if path.suffix == ".png" and path.is_file():
            latest[f"{artifact.folder}/{path.stem.rstrip('0123456789')}"] = path
    shown = [
        f"<figure><img alt='{escape(path.stem)}' src='data:image/png;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'><figcaption>{escape(path.name)}</figcaption></figure>"
        for path in latest.values()
    ]
    return f"<div class='charts'>{''.join(shown)}</div>" if shown else ""


def _data_rows(history: RunHistory) -> list[tuple[str, ...]]:
    return [
        (data.context, data.name, data.digest[:16], ", ".join(f"{k} {v}" for k, v in data.facts.items()), data.source)
        for data in history.datasets
    ]


def _attempt_rows(history: RunHistory) -> list[tuple[str, ...]]:
    return [
        (str(tried.number), _clock(tried.begun_ms), _clock(tried.ended_ms), tried.state, tried.reason)
        for tried in history.attempts
    ]


def _plain_tags(history: RunHistory) -> dict[str, str]:
    return {name: value for name, value in history.tags.items() if name != "mlflow.note.content"}
