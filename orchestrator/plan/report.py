"""The forecast as a table, beside what really happened when the run has been done."""

from __future__ import annotations

import re
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


def _bandwidth(value: float) -> str:
    return f"{value * 8 / 1e9:.3g} Gbit/s"


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
    "gather_bytes": ("weights gathered per device and step", _bytes),
    "scatter_bytes": ("gradients scattered per device and step", _bytes),
    "shard_bytes_per_s": ("bandwidth to hide both", _bandwidth),
    "allreduce_bytes": ("all-reduce per device and step", _bytes),
    "allreduce_bytes_per_s": ("bandwidth to hide it", _bandwidth),
    "images_per_second": ("images/s on all devices", _count),
    "seconds_per_step": ("time per step", _seconds),
    "hours": ("time in all", lambda value: _seconds(value * 3600)),
}


RESERVED = re.compile(r"system/[^/]+/gpu_\d+_memory_reserved_mb")


def outcome(history: RunHistory) -> dict[str, float]:
    """What a finished or interrupted run came to: only what its journal holds, and what follows from that alone."""
    found: dict[str, float] = {}

    def take(name: str, metric: str, how: Callable[[list[float]], float]) -> None:
        values = list(history.series.get(metric, {}).values())
        if values:
            found[name] = how(values)

    if "student.parameters" in history.tags:
        found["parameters"] = float(history.tags["student.parameters"])
    reserved = [max(points.values()) for name, points in history.series.items() if RESERVED.fullmatch(name)]
    if any(reserved):
        found["memory_bytes"] = max(reserved) * 1e6
    batch = float(history.params.get("train.global_batch", 0))
    steps = history.series.get("train/loss", {})
    if steps:
        found["steps"] = max(steps)
    if steps and batch:
        found["samples"] = max(steps) * batch
    take("images_per_second", "train/images_per_second", statistics.median)
    take("checkpoint_bytes", "checkpoint/bytes", max)
    take("checkpoint_stall_s", "checkpoint/blocked_seconds", statistics.median)
    if "images_per_second" in found and batch:
        found["seconds_per_step"] = batch / found["images_per_second"]
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
    if "memory_bytes" in happened:
        lines.append("outcome of memory: what torch's allocator had reserved, more than tensors need")
    return "\n".join([title, *(line.rstrip() for line in lines)])
