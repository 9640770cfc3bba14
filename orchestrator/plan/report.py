"""The forecast as a table, beside what really happened when the run has been done."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from orchestrator.track.history import RunHistory


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 120 else f"{value / 3600:.3g} h"


Show = Callable[[float], str]
LABELS: dict[str, tuple[str, Show]] = {
    "parameters": ("parameters of the student", _count),
    "teacher_parameters": ("parameters of the teacher", _count),
    "flops_per_image": ("FLOPs per image and step", _count),
    "memory_bytes": ("memory per device", _bytes),
    "steps": ("steps", _count),
    "samples": ("images in all", _count),
    "tokens": ("patch tokens in all", _count),
    "checkpoint_bytes": ("one checkpoint", _bytes),
    "checkpoint_stall_s": ("stall per checkpoint", _seconds),
    "checkpoint_total_bytes": ("all checkpoints written", _bytes),
    "data_egress_bytes": ("data read from storage", _bytes),
    "allreduce_bytes": ("all-reduce per device and step", _bytes),
    "allreduce_bytes_per_s": ("bandwidth to hide it", lambda value: f"{value * 8 / 1e9:.3g} Gbit/s"),
    "images_per_second": ("images/s on all devices", _count),
    "seconds_per_step": ("time per step", _seconds),
    "hours": ("time in all", lambda value: _seconds(value * 3600)),
}


def outcome(history: RunHistory, global_batch: int) -> dict[str, float]:
    """What a finished or interrupted run came to, as far as its journal tells."""
    found: dict[str, float] = {}

    def take(name: str, metric: str, how: Callable[[list[float]], float]) -> None:
        values = list(history.series.get(metric, {}).values())
        if values:
            found[name] = how(values)

    steps = history.series.get("train/loss", {})
    if steps:
        found["steps"] = max(steps)
        found["samples"] = max(steps) * global_batch
    take("images_per_second", "train/images_per_second", statistics.median)
    take("checkpoint_bytes", "checkpoint/bytes", max)
    take("checkpoint_stall_s", "checkpoint/blocked_seconds", statistics.median)
    if "images_per_second" in found:
        found["seconds_per_step"] = global_batch / found["images_per_second"]
    active = sum(attempt.ended_ms - attempt.begun_ms for attempt in history.attempts) / 1000
    if active:
        found["hours"] = active / 3600
    return found


def table(expected: dict[str, float], happened: dict[str, float], title: str) -> str:
    """Aligned columns: quantity, forecast and, after a run, outcome and their ratio."""
    rows = []
    for name, value in expected.items():
        label, show = LABELS[name]
        row = [label, show(value)]
        if happened:
            row += [show(happened[name]), f"{happened[name] / value:.2f}"] if name in happened and value else ["", ""]
        rows.append(row)
    heads = ["", "forecast", "outcome", "ratio"][: 4 if happened else 2]
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *rows]]
    return "\n".join([title, *(line.rstrip() for line in lines)])
