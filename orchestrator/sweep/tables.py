"""Results as files for people and programs: CSV, Markdown, recipes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.config.load import to_recipe
from orchestrator.config.tree import PretrainConfig, SweepJobConfig, pretrain_part
from orchestrator.sweep.journal import End
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, PRUNED
from orchestrator.sweep.legal import with_fields
from orchestrator.sweep.results import BASELINE, Point, Results, interval

UNITS = {
    "accuracy": ("accuracy %", 100.0),
    "accuracy_loss": ("accuracy lost, points", 100.0),
    "speedup": ("times faster", 1.0),
    "images_per_second": ("images/s", 1.0),
    "gflops": ("GFLOPs", 1.0),
    "memory_mb": ("peak activations MB", 1.0),
}
"""Heading of a measured value, and what it is multiplied with for people."""
_KEPT = ("model.img_size", "model.migration.", "model.gathering.", "eval.")
"""What a recommendation always says: in `jobs/evaluate.py` the checkpoint's own run would otherwise fill it in."""


def points_csv(points: Sequence[Point], measured: Sequence[str]) -> str:
    """One row per point: the measured values with their intervals, then the configuration fields."""
    out = io.StringIO()
    fields = sorted({name for point in points for name in point.fields})
    columns = [part for name in measured for part in (name, f"{name}_low", f"{name}_high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", *columns, *fields])
    for point in points:
        numbers = [part for name in measured for part in (point.values[name], *interval(point, name))]
        settings = [json.dumps(point.fields[name]) if name in point.fields else "" for name in fields]
        writer.writerow(["unreduced" if point.number == BASELINE else point.number, *numbers, *settings])
    return out.getvalue()


def front_markdown(results: Results) -> str:
    """The front as a table, with what counts as distinct and what is recommended."""
    roles = results.roles
    counted = {point.number for point in results.distinct}
    heads = ["trial", *(UNITS[name][0] for name in results.names), "distinct", "recommended", "setting"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for point in results.front:
        cells = ["unreduced" if point.number == BASELINE else str(point.number)]
        cells += [shown(point, name) for name in results.names]
        cells += ["yes" if point.number in counted else "", roles.get(point.number, ""), point.label]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(point: Point, name: str) -> str:
    """A value with its interval."""
    factor = UNITS[name][1]
    value, (low, high) = factor * point.values[name], interval(point, name)
    digits = 2 if factor == 100 else 3 if name == "speedup" else 1
    text = f"{value:.{digits}f}"
    return text if low == high else f"{text} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def trials_line(results: Results) -> str:
    """How many trials ended how."""
    states = {FINISHED: "measured", INFEASIBLE: "out of memory", PRUNED: "pruned", FAILED: "failed"}
    return ", ".join(f"{results.count(state)} {word}" for state, word in states.items())


def failures_text(ends: dict[int, End]) -> str:
    """One line per trial that was not measured, with its error."""
    lines = [f"trial {n}: {e.state}: {e.error.splitlines()[0]}" for n, e in sorted(ends.items()) if e.error]
    return "\n".join(lines)


def recommended_recipe(config: SweepJobConfig, results: Results, name: str) -> str:
    """A recipe with the recommended setting, for `jobs/pretrain.py` and `jobs/evaluate.py`.

    Args:
        config: resolved configuration of the sweep.
        results: of the sweep.
        name: which recommendation.
    """
    point = results.recommended[name]
    plain = pretrain_part(with_fields(config, point.fields))
    size = config.data.image_size
    # Places and names are the user's, not the recipe's.
    defaults = PretrainConfig()
    plain = replace(
        plain,
        model=replace(plain.model, img_size=size),
        data=replace(plain.data, image_size=0, source="", store=defaults.data.store),
        track=defaults.track,
        cluster=defaults.cluster,
        run=defaults.run,
    )
    head = [f"Recommended by a sweep ({name}): {point.label}.", *_measured(config, results, point)]
    return "".join(f"# {line}\n" for line in head) + to_recipe(plain, _KEPT)


def _measured(config: SweepJobConfig, results: Results, point: Point) -> list[str]:
    """The header's lines about where a recommendation comes from."""
    figures = ", ".join(f"{UNITS[name][0]} {shown(point, name)}" for name in results.names)
    size, base = config.data.image_size, results.baseline
    if base is None:
        return [
            f"Follows: trial {point.number}, trained at {size} px: {figures}.",
            "Command: python jobs/pretrain.py --recipe THIS_FILE",
            "Verified: by the sweep, one seed",
        ]
    plain = ", ".join(f"{UNITS[name][0]} {shown(base, name)}" for name in results.names)
    checkpoint = config.evaluate.checkpoint
    return [
        f"Follows: trial {point.number}, measured at {size} px on {checkpoint}:",
        f"  {figures};",
        f"  unreduced: {plain}.",
        f"Command: python jobs/evaluate.py --recipe THIS_FILE --checkpoint {checkpoint}",
        "     or: python jobs/pretrain.py --recipe THIS_FILE",
        "Verified: by the sweep for the checkpoint above; training with it is unverified",
    ]


def summary(results: Results, facts: dict[str, Any]) -> dict[str, Any]:
    """The results as plain values."""
    return {
        **facts,
        "trials": trials_line(results),
        "baseline": None if results.baseline is None else dict(results.baseline.values),
        "noise": results.noise,
        "front": [point.number for point in results.front],
        "distinct": [point.number for point in results.distinct],
        "recommended": {name: point.number for name, point in results.recommended.items()},
        "hypervolume": results.volume,
    }
