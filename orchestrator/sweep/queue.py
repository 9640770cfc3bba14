"""Which training trial gets the next piece of work: trials rest at some rungs, and the best ones go on first.

With the sampler "curves" its model says which (`curve_sampler.py`). With any other one this is successive halving that
throws nothing away: of all trials that have come to a resting rung, one in `FACTOR` goes on at
once: the best by non-dominated rank and, within a rank, by how much it would add to the hypervolume. The others wait
while new settings are tried, and go on later. Either way only the order is decided here; what stops a trial for good is
the bound of `pruning.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.sweep.curve_sampler import Curve, CurveSampler
from orchestrator.sweep.front import Gains, Objective, gains, hypervolume, ranks
from orchestrator.sweep.known import Sampler

PARTS = (1 / 8,)
FACTOR = 3


@dataclass(frozen=True)
class Standing:
    """How far a trial in training has come.

    Attributes:
        number: of the trial.
        curve: its gains [R, M], one row per rung that it has reached, at least one.
        waiting: whether it rests and could go on.
        ended: whether it has finished or was stopped.
    """

    number: int
    curve: Gains
    waiting: bool
    ended: bool = False


@dataclass(frozen=True)
class Queue:
    """How a sweep's trials queue.

    Attributes:
        goals: the objectives.
        length: rungs of a complete training.
        budget: complete trainings that all trials together may cost; 0 = no limit.
    """

    goals: Sequence[Objective]
    length: int
    budget: float = 0.0

    def spent(self, curves: Mapping[int, Curve]) -> bool:
        """Whether the budget is used up."""
        return self.left(curves) <= 0

    def left(self, curves: Mapping[int, Curve]) -> float:
        """Rungs that the budget still pays for."""
        return self.budget * self.length - sum(len(curve) for curve in curves.values()) if self.budget else math.inf

    def turn(
        self, curves: Mapping[int, Curve], resting: Collection[int], ended: Collection[int], more: bool,
        sampler: Sampler,
    ) -> int | None:  # fmt: skip
        """Number of the resting trial that goes on now; None when a new setting shall be tried (or nothing is left).

        Args:
            curves: by trial number.
            resting: trials that could go on.
            ended: trials that have finished or were stopped.
            more: whether new settings may still be tried.
            sampler: of the sweep; one that has a model of the curves orders the queue, ranks do otherwise.
        """
        if isinstance(sampler, CurveSampler):
            return sampler.turn(curves, resting, self.length, more, self.left(curves))
        standings = [
            Standing(number, gains(curve, self.goals), number in resting, number in ended)
            for number, curve in sorted(curves.items())
            if curve
        ]
        return turn(standings, self.length, more)


def resting_rungs(length: int) -> list[int]:
    """0-based rungs at which trials rest: after these parts of a complete training, but not at its end."""
    return sorted({math.ceil(length * part) - 1 for part in PARTS} - {length - 1}) if length else []


def turn(standings: Sequence[Standing], length: int, more: bool) -> int | None:
    """Number of the waiting trial that goes on now; None when a new setting shall be tried (or nothing is left).

    Args:
        standings: every trial that has reached a rung, however it ended.
        length: rungs of a complete training.
        more: whether new settings may still be tried.
    """
    # the highest rung first: what is nearly done is done first
    for rung in reversed(resting_rungs(length)):
        reached = [standing for standing in standings if len(standing.curve) > rung]
        waiting = [s for s in reached if s.waiting and len(s.curve) == rung + 1]
        gone = [s for s in reached if len(s.curve) > rung + 1 or not (s.waiting or s.ended)]
        if waiting and (not more or len(gone) < len(reached) // FACTOR):
            return _best(waiting, gone, [s.curve for s in standings if len(s.curve) == length])
    return None


def _best(waiting: Sequence[Standing], gone: Sequence[Standing], finished: Sequence[Gains]) -> int:
    """Number of the waiting trial with the best rank beside those that went on; of equals the one that adds most."""
    ends = np.stack([expected_end(standing.curve, finished) for standing in (*waiting, *gone)])
    rank_N, others, reference_M = ranks(ends), ends[len(waiting) :], ends.min(0)

    def place(index: int) -> tuple[int, float]:
        return int(rank_N[index]), -hypervolume(np.vstack([others, ends[index]]), reference_M)

    return waiting[min(range(len(waiting)), key=place)].number


def expected_end(curve: Gains, finished: Sequence[Gains]) -> Gains:
    """Gains [M] that a trial would end with if it gained from here what finished trials gained in the median.

    Args:
        curve: the trial's gains so far, [R, M], at least one row.
        finished: curves of trials that were trained to their end.
    """
    if not finished:
        return np.asarray(curve[-1])
    grown = np.stack([whole[-1] - whole[len(curve) - 1] for whole in finished])
    return np.asarray(curve[-1] + np.median(grown, axis=0))
