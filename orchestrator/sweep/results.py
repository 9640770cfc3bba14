"""What a sweep found: points with intervals, the front, what can be told apart on it, and what to use. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.sweep.config import MEASURED, TRAIN, SweepConfig
from orchestrator.sweep.front import Gains, best, best_within, distinct, front, gains, hypervolume, knee
from orchestrator.sweep.journal import End, by_time, finished
from orchestrator.sweep.known import Trial
from orchestrator.sweep.limits import parse_limits

BASELINE = -1
"""Number of the unreduced model's point."""
_Z = 1.96
_REFERENCE_LOSS = 0.1
KNEE, FASTEST, ACCURATE = "knee", "fastest", "accurate"


@dataclass(frozen=True)
class Point:
    """One measured setting, or the unreduced model.

    Attributes:
        number: of the trial; `BASELINE` for the unreduced model.
        label: the setting in words.
        fields: configuration field -> value.
        values: measured value by name.
        low: lower end of a value's interval, where it has one.
        high: upper end.
    """

    number: int
    label: str
    fields: Mapping[str, Any]
    values: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """Everything that tables, pictures and recommendations are made of.

    Attributes:
        config: of the sweep.
        baseline: the unreduced model; None in a training sweep, which has no checkpoint to compare with.
        reference: the point above which volume is counted; it does not move while a sweep goes on.
        points: measured settings in order of number.
        ends: how every trial ended.
        noise: largest deviation from 1 of the unreduced model's speed against itself (95th percentile over trials).
    """

    config: SweepConfig
    baseline: Point | None
    reference: Mapping[str, float]
    points: Sequence[Point]
    ends: Mapping[int, End]
    noise: float

    @cached_property
    def allowed(self) -> list[Point]:
        """The unreduced model, then the settings that keep the limits."""
        limits = parse_limits(self.config.limits, MEASURED)
        keep = [p for p in self.points if all(limit.violation(p.values) <= 0 for limit in limits)]
        return [*self.beside, *keep]

    @property
    def beside(self) -> list[Point]:
        """The unreduced model, where there is one."""
        return [] if self.baseline is None else [self.baseline]

    @cached_property
    def names(self) -> list[str]:
        """What was measured of every point, in the order of `MEASURED`."""
        everything = [*self.beside, *self.points]
        return [name for name in MEASURED if all(name in point.values for point in everything)]

    @cached_property
    def front(self) -> list[Point]:
        """Points that no other beats, most accurate first; the unreduced model competes."""
        if not self.allowed:
            return []
        found = [self.allowed[index] for index in front(self._gains(self.allowed))]
        return sorted(found, key=lambda point: -point.values["accuracy"])

    @cached_property
    def distinct(self) -> list[Point]:
        """Front settings whose interval in some objective is apart from that of every other one that counts."""
        settings = [point for point in self.front if point.number != BASELINE]
        if not settings:
            return []
        values, low, high = self._gains(settings), self._gains(settings, "low"), self._gains(settings, "high")
        order_by = self.config.objectives.index("accuracy")
        return [settings[i] for i in distinct(values, np.minimum(low, high), np.maximum(low, high), order_by)]

    @cached_property
    def recommended(self) -> dict[str, Point]:
        """Name -> setting: the knee, the fastest within the tolerance, the most accurate. Empty without settings."""
        settings = [point for point in self.front if point.number != BASELINE]
        # With nothing on the front the unreduced model beats every setting; the best of them is still named.
        settings = settings or [point for point in self.allowed if point.number != BASELINE]
        if not settings:
            return {}
        values, goals = self._gains(settings), list(self.config.objectives)
        accuracy = goals.index("accuracy")
        speed = next((i for i, name in enumerate(goals) if name != "accuracy"), accuracy)
        best_known = max(p.values["accuracy"] for p in settings)
        floor = (self.baseline.values["accuracy"] if self.baseline else best_known) - self.config.tolerance
        fastest = best_within(values, speed, accuracy, floor)
        found = {KNEE: knee(values), ACCURATE: best(values, accuracy)}
        if fastest is not None:
            found[FASTEST] = fastest
        return {name: settings[found[name]] for name in (KNEE, FASTEST, ACCURATE) if name in found}

    @property
    def roles(self) -> dict[int, str]:
        """Trial number -> what it is recommended as."""
        named: dict[int, list[str]] = {}
        for name, point in self.recommended.items():
            named.setdefault(point.number, []).append(name)
        return {number: ", ".join(names) for number, names in named.items()}

    @cached_property
    def volume(self) -> list[float]:
        """Hypervolume of the front after each ended trial, above `reference`."""
        reference_M = gains([self.reference], self.config.goals())[0]
        allowed = {point.number: point for point in self.allowed}
        seen, series = self.beside, []
        for number, _ in by_time(self.ends):
            if number in allowed:
                seen.append(allowed[number])
            series.append(hypervolume(self._gains(seen), reference_M))
        return series

    def _gains(self, points: Sequence[Point], end: str = "values") -> Gains:
        return gains([{**p.values, **getattr(p, end)} for p in points], self.config.goals())

    def count(self, state: str) -> int:
        """Trials that ended so."""
        return sum(end.state == state for end in self.ends.values())


def build(
    config: SweepConfig, trials: Mapping[int, Trial], ends: Mapping[int, End], plain: Mapping[str, Any]
) -> Results:
    """Results from a journal.

    Args:
        config: of the sweep.
        trials: by number.
        ends: by number.
        plain: the unreduced model's record (`measure.baseline`, `train.baseline`).
    """
    done = finished(ends)
    if config.mode == TRAIN:
        points = [_trained(trials[number], end) for number, end in done.items()]
        # Nothing was measured beside: volume is counted above no accuracy at the unreduced model's cost.
        return Results(config, None, {"accuracy": 0.0, "gflops": plain["gflops"]}, points, ends, 0.0)
    noise = [abs(end.details["noise"][0] - 1) for end in done.values()]
    floor = float(np.percentile(noise, 95)) if noise else 0.0
    rates = [end.details["plain_images_per_second"][0] for end in done.values()]
    rate = statistics.median(rates) if rates else 0.0
    base = _baseline(config, rate, plain, floor)
    reference = {**base.values, "accuracy": base.values["accuracy"] - _REFERENCE_LOSS}
    points = [_point(config, trials[number], end, floor, rate) for number, end in done.items()]
    return Results(config, base, reference, points, ends, floor)


def _trained(trial: Trial, end: End) -> Point:
    """A trial that was trained: its accuracy with the binomial interval of the held-out images."""
    accuracy, half = end.values["accuracy"], _Z * end.details["standard_error"]
    label = ", ".join(f"{name.removeprefix('model.')}={value}" for name, value in trial.setting.fields.items())
    low, high = {"accuracy": accuracy - half}, {"accuracy": accuracy + half}
    return Point(trial.number, label, trial.setting.fields, dict(end.values), low, high)


def _point(config: SweepConfig, trial: Trial, end: End, noise: float, rate: float) -> Point:
    """A measured setting; images per second are those of a machine on which the unreduced model makes `rate`."""
    details, values = end.details, dict(end.values)
    half = _Z * details["scores"][_method(config)]["difference"][1]
    low = {"accuracy": values["accuracy"] - half, "accuracy_loss": values["accuracy_loss"] - half}
    high = {"accuracy": values["accuracy"] + half, "accuracy_loss": values["accuracy_loss"] + half}
    median, lower, upper = details["speedup"]
    # An interval narrower than what the unreduced model differs from itself would be a pretence.
    low["speedup"], high["speedup"] = min(lower, median * (1 - noise)), max(upper, median * (1 + noise))
    # Machines are faster in one minute than in the next: only the paired ratio can be compared between trials.
    values["images_per_second"] = rate * median
    low["images_per_second"], high["images_per_second"] = rate * low["speedup"], rate * high["speedup"]
    label = f"migration {details['migration']}; gathering {details['gathering']}"
    return Point(trial.number, label, trial.setting.fields, values, low, high)


def _baseline(config: SweepConfig, rate: float, plain: Mapping[str, Any], noise: float) -> Point:
    top1 = plain["scores"][_method(config)]["top1"]
    values = {
        "accuracy": top1[0],
        "accuracy_loss": 0.0,
        "speedup": 1.0,
        "images_per_second": rate,
        "gflops": plain["gflops"],
        "memory_mb": plain["memory_mb"],
    }
    low = {"speedup": 1 - noise}
    high = {"speedup": 1 + noise}
    return Point(BASELINE, "unreduced", {}, values, low, high)


def _method(config: SweepConfig) -> str:
    from orchestrator.evaluate.quality import KNN, LINEAR

    return {"knn": KNN, "linear": LINEAR}[config.accuracy]


def interval(point: Point, name: str) -> tuple[float, float]:
    """A value's interval; the value itself where it has none."""
    return point.low.get(name, point.values[name]), point.high.get(name, point.values[name])
