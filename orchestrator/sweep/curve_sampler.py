"""The sampler "curves": asks for the setting that a forecast from all learning curves thinks most of.

One model serves two questions. Which new setting is tried: of all settings of the space (of random draws and
neighbours of good ones where it is too large) the one that is expected to add most hypervolume. And who has the next
turn: of all trials that rest and the best new setting the one that is expected to add most per rung that it still has
to train. The order is all that it decides; what stops a trial is `pruning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt

from itpn_core.random import name_key
from orchestrator.sweep.forecast import Array, Forecast, encode
from orchestrator.sweep.front import Objective, front
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, RUNNING, Known, Trial
from orchestrator.sweep.limits import Limit
from orchestrator.sweep.parameter import Value
from orchestrator.sweep.space import Setting, Space
from orchestrator.sweep.worth import expected

Curve = Sequence[Mapping[str, float]]
"""What a trial in training measured, rung by rung."""

WHOLE = 10_000
"""Spaces of up to so many settings are searched in full."""
DRAWN = 256
_FITS = "fits"


@dataclass(frozen=True)
class _Forecasts:
    """What every setting would come to: one forecast per objective, then one per further value that a limit names."""

    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]
    names: tuple[str, ...]
    models: tuple[Forecast, ...]

    def ends(self, points_ND: Array) -> tuple[Array, Array]:
        """Mean and deviation [N, M]; of the objectives more is better."""
        pairs = [model.ends(points_ND) for model in self.models]
        return np.stack([mean for mean, _ in pairs], axis=1), np.stack([some for _, some in pairs], axis=1)

    def allowed(self, points: Array) -> npt.NDArray[np.bool_]:
        """Whether forecast values [..., M] keep every limit."""
        kept = np.ones(points.shape[:-1], dtype=bool)
        for limit in self.limits:
            place = self.names.index(limit.name)
            sign = self.objectives[place].sign if place < len(self.objectives) else 1.0
            value = sign * points[..., place]
            kept &= value >= limit.bound if limit.operator == ">=" else value <= limit.bound
        return kept


class CurveSampler:
    """See the file's head.

    Args:
        space: what may be tried; nothing is proposed twice.
        objectives: at least one.
        limits: what makes a setting worthless.
        seed: of the first settings and of random candidates.
        trials: what a journal holds.
        startup: random settings before the model is asked.
    """

    def __init__(
        self, space: Space, objectives: Sequence[Objective], limits: Sequence[Limit], seed: int,
        trials: Sequence[Trial], startup: int,
    ) -> None:  # fmt: skip
        self._known, self._seed, self._startup = Known(space, seed, trials), seed, startup
        self._space, self._objectives, self._limits = space, tuple(objectives), tuple(limits)
        self._trials = {trial.number: trial for trial in trials}
        self._curves: Mapping[int, Curve] = {}
        self._resting: frozenset[int] = frozenset()
        self._length = 1
        self._answered: tuple[object, _Forecasts | None, Setting | None] = (None, None, None)

    def ask(self) -> Trial | None:
        """See `Sampler`."""
        setting = self._answer()[1] if self._known.next >= self._startup else None
        if setting is None:
            setting = self._known.random()
        if setting is None:
            return None
        trial = self._known.start(setting, {})
        self._trials[trial.number] = trial
        return trial

    def tell(self, number: int, state: str, values: Mapping[str, float] | None = None) -> None:
        """See `Sampler`."""
        self._known.check_end(number, state)
        trial = self._trials[number]
        self._trials[number] = Trial(number, trial.setting, state, values or {}, trial.memo)

    def turn(
        self, curves: Mapping[int, Curve], resting: Collection[int], length: int, more: bool, left: float = math.inf
    ) -> int | None:
        """Number of the resting trial that goes on now; None when a new setting shall be tried (or nothing is left).

        Args:
            curves: what every trial measured, by number; the next `ask` builds on them too.
            resting: trials that could go on.
            length: rungs of a complete training.
            more: whether new settings may still be tried.
            left: rungs that the budget still pays for; what it cannot finish comes last.
        """
        self._curves, self._resting, self._length = curves, frozenset(resting), length
        waiting = sorted(resting)
        if not waiting or (more and self._known.next < self._startup):
            return None
        forecasts, new = self._answer()
        if forecasts is None:
            return None if more else waiting[0]
        candidates = [self._trials[number].setting for number in waiting] + ([new] if new and more else [])
        costs = np.full(len(candidates), float(length))
        costs[: len(waiting)] -= [len(curves[number]) for number in waiting]
        worth = self._worth(forecasts, encode(self._space, candidates)) / costs
        worth[costs > left - self._promised()] -= worth.max() + 1
        best = int(np.argmax(worth))
        return waiting[best] if best < len(waiting) else None

    def _promised(self) -> int:
        """Rungs that trials which are being trained have still to go."""
        going = [n for n, trial in self._trials.items() if trial.state == RUNNING and n not in self._resting]
        return sum(self._length - len(self._curves.get(number, ())) for number in going)

    def _answer(self) -> tuple[_Forecasts | None, Setting | None]:
        """The model of what is known, and the new setting that it thinks most of; kept until more is known."""
        known = (self._length, self._resting, [(n, t.state, len(self._curve(n))) for n, t in self._trials.items()])
        if self._answered[0] != known:
            forecasts = self._forecasts()
            self._answered = known, forecasts, self._best_new(forecasts) if forecasts else None
        return self._answered[1:]

    def _curve(self, number: int) -> Curve:
        """What a trial measured, rung by rung; without a queue its end is all there is."""
        trial = self._trials[number]
        if trial.state == FAILED:
            return ()
        if self._curves:
            return self._curves.get(number, ())[: self._length]
        return (trial.values,) if trial.values else ()

    def _forecasts(self) -> _Forecasts | None:
        """Fitted to all curves, whatever became of their trials; None before anything was measured."""
        curves = {number: curve for number in sorted(self._trials) if (curve := self._curve(number))}
        if not curves:
            return None
        points = encode(self._space, [self._trials[number].setting for number in curves])
        wanted = dict.fromkeys([*(o.name for o in self._objectives), *(limit.name for limit in self._limits)])
        names = [name for name in wanted if all(name in values for curve in curves.values() for values in curve)]
        signs = {objective.name: objective.sign for objective in self._objectives}
        models = [
            Forecast(points, [signs.get(n, 1.0) * np.array([v[n] for v in c]) for c in curves.values()], self._length)
            for n in names
        ]
        limits = [limit for limit in self._limits if limit.name in names]
        lost = [trial.setting for trial in self._trials.values() if trial.state == INFEASIBLE]
        if lost:
            fits = [np.ones(1)] * len(curves) + [np.zeros(1)] * len(lost)
            models.append(Forecast(np.concatenate([points, encode(self._space, lost)]), fits, 1))
            limits.append(Limit(_FITS, ">=", 0.5))
        return _Forecasts(self._objectives, tuple(limits), (*names, _FITS), tuple(models))

    def _held(self) -> list[Setting]:
        """Settings that have finished or are being trained: a candidate counts for what it adds to those."""
        return [
            trial.setting
            for number, trial in sorted(self._trials.items())
            if trial.state == FINISHED or (trial.state == RUNNING and number not in self._resting)
        ]

    def _worth(self, forecasts: _Forecasts, points: Array) -> Array:
        mean, deviation = forecasts.ends(points)
        held = self._held()
        ends = forecasts.ends(encode(self._space, held))[0] if held else mean[:0]
        return expected(mean, deviation, ends, len(self._objectives), forecasts.allowed)

    def _best_new(self, forecasts: _Forecasts) -> Setting | None:
        settings, points = self._candidates(forecasts)
        return settings[int(np.argmax(self._worth(forecasts, points)))] if settings else None

    @cached_property
    def _whole(self) -> tuple[list[Setting], Array] | None:
        """Every setting of a space that is small enough, and its points."""
        if self._space.continuous:
            return None
        settings = list(islice(self._space.grid(), WHOLE + 1))
        return (settings, encode(self._space, settings)) if len(settings) <= WHOLE else None

    def _candidates(self, forecasts: _Forecasts) -> tuple[list[Setting], Array]:
        """Settings that may be tried next, and their points."""
        if self._whole:
            settings, points = self._whole
            new = [index for index, setting in enumerate(settings) if setting not in self._known.settings]
            return [settings[index] for index in new], points[new]
        seed = int(name_key(self._seed, self._known.next, "sweep/candidates"))
        drawn = [self._space.draw(seed, index) for index in range(DRAWN)]
        held = self._held()
        good = drawn[:1]
        if held:
            mean, _ = forecasts.ends(encode(self._space, held))
            good = [held[index] for index in front(mean[:, : len(self._objectives)])]
        found = dict.fromkeys([*drawn, *_around(self._space, good, drawn)])
        settings = [setting for setting in found if setting not in self._known.settings]
        return settings, encode(self._space, settings)


def _around(space: Space, good: Sequence[Setting], drawn: Sequence[Setting]) -> list[Setting]:
    """Good settings in which one parameter is as in a drawn one, and with it those that exist only then."""
    found = []
    for index, other in enumerate(drawn):
        kept = good[index % len(good)]
        changed = space.parameters[index // len(good) % len(space.parameters)].name
        chosen: dict[str, Value] = {}
        for parameter in space.parameters:
            if space.active(parameter, chosen):
                first, second = (other, kept) if parameter.name == changed else (kept, other)
                if parameter.name not in first and parameter.name not in second:
                    break
                chosen[parameter.name] = first[parameter.name] if parameter.name in first else second[parameter.name]
        else:
            setting = space.setting(chosen)
            if not space.refusal(setting):
                found.append(setting)
    return found
