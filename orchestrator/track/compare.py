"""What differs between two runs: settings, code, data, and where their curves part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.track.history import RunHistory

_FACTS = ("git.commit", "git.state", "source.sha256", "manifest.sha256", "device", "cluster.shape", "image")
_NOT_RESULTS = ("system/", "tracking/", "data/wait", "train/images_per_second")


@dataclass(frozen=True)
class Parting:
    """Where two curves of one metric part.

    Attributes:
        metric: its name.
        common: number of steps that both runs recorded.
        first: first common step with different values; None when all are equal.
        visible: first common step from which they differ by more than the tolerance; None when they never do.
        at_visible: both values there.
        last: both values at the last common step.
    """

    metric: str
    common: int
    first: int | None
    visible: int | None
    at_visible: tuple[float, float] | None
    last: tuple[float, float]


def differences(one: Mapping[str, str], two: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, value of one, value of two) where two mappings differ; an absent value is "(absent)"."""
    return [
        (name, one.get(name, "(absent)"), two.get(name, "(absent)"))
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]


def part(metric: str, one: Mapping[int, float], two: Mapping[int, float], tolerance: float) -> Parting | None:
    """Where two curves part; None when they share no step.

    Args:
        metric: its name.
        one: value by step of the first run.
        two: value by step of the second run.
        tolerance: relative difference that counts as visible.
    """
    steps = sorted(one.keys() & two.keys())
    if not steps:
        return None
    first = next((step for step in steps if not _equal(one[step], two[step])), None)
    visible = next((step for step in steps if not _close(one[step], two[step], tolerance)), None)
    pair = None if visible is None else (one[visible], two[visible])
    return Parting(metric, len(steps), first, visible, pair, (one[steps[-1]], two[steps[-1]]))


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _close(a: float, b: float, tolerance: float) -> bool:
    return _equal(a, b) or abs(a - b) <= tolerance * max(abs(a), abs(b))


def partings(one: RunHistory, two: RunHistory, tolerance: float) -> list[Parting]:
    """Metrics of both runs, the earliest visible parting first; clocks and machine load are left out."""
    names = [name for name in one.series if name in two.series and not name.startswith(_NOT_RESULTS)]
    found = [part(name, one.series[name], two.series[name], tolerance) for name in names]
    return sorted(
        (parting for parting in found if parting is not None),
        key=lambda parting: (
            math.inf if parting.visible is None else parting.visible,
            math.inf if parting.first is None else parting.first,
            parting.metric,
        ),
    )


def comparison(one: RunHistory, two: RunHistory, tolerance: float = 0.01) -> str:
    """The comparison as a text for the terminal."""
    facts = [
        {name: run.tags[name] for name in (*_FACTS, "recipe") if name in run.tags}
        | {f"data {data.context}": f"{data.name} {data.digest[:12]}" for data in run.datasets}
        for run in (one, two)
    ]
    lines = [f"A  {one.name}  ({one.run_uid})", f"B  {two.name}  ({two.run_uid})", ""]
    lines += _table("settings that differ", differences(one.params, two.params), "the settings are equal")
    lines += _table("code, data and machine that differ", differences(*facts), "code, data and machine are equal")
    found = partings(one, two, tolerance)
    lines.append(f"curves, the first to part on top (visible: more than {tolerance:.0%} apart)")
    for parting in found:
        lines.append("  " + _sentence(parting))
    if not found:
        lines.append("  no metric was recorded at the same step in both runs")
    only = differences(dict.fromkeys(one.series, "recorded"), dict.fromkeys(two.series, "recorded"))
    lines += [f"  {name}: only in {'A' if a == 'recorded' else 'B'}" for name, a, _ in only]
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str, str]], nothing: str) -> list[str]:
    if not rows:
        return [nothing, ""]
    width = max(len(name) for name, _, _ in rows)
    return [title, *(f"  {name:<{width}}  A {a}  B {b}" for name, a, b in rows), ""]


def _sentence(parting: Parting) -> str:
    ends = f"last common values A {parting.last[0]:.6g}, B {parting.last[1]:.6g}"
    if parting.first is None:
        return f"{parting.metric}: equal at all {parting.common} common steps ({ends})"
    if parting.visible is None or parting.at_visible is None:
        return f"{parting.metric}: differs from step {parting.first}, never visibly; {ends}"
    a, b = parting.at_visible
    return (
        f"{parting.metric}: differs from step {parting.first}, visibly from step {parting.visible} "
        f"(A {a:.6g}, B {b:.6g}); {ends}"
    )
