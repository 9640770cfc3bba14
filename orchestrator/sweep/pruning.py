"""When a training trial may be stopped, and which waiting trial runs next.

A trial stops only when even an optimistic guess of its end is beaten: its value at this rung plus the 95th percentile
of what finished trials gained from this rung to their end, objective by objective, is dominated by the front of
finished trials, and by a second finished trial as well: one may owe its place to luck in measuring. Nothing stops
before `MIN_FINISHED` trials have finished. Ranks never stop a trial; they order the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orchestrator.sweep.front import Gains, crowding, dominates, ranks

MIN_FINISHED = 8
PERCENTILE = 95.0
WITNESSES = 2
"""So many finished trials must dominate a bound."""


def optimistic_bound(value_M: Gains, rung: int, finished: Sequence[Gains]) -> Gains | None:
    """What a trial could still reach, or None while too few trials have finished.

    Args:
        value_M: the trial's gains at `rung` (more is better).
        rung: 0-based rung that was just evaluated.
        finished: curves [R, M] of trials that reached the last rung R - 1, one row per rung.
    """
    if len(finished) < MIN_FINISHED:
        return None
    grown = np.stack([curve[-1] - curve[rung] for curve in finished])
    # "higher": an observed gain, never an interpolation below it
    return np.asarray(value_M + np.percentile(grown, PERCENTILE, axis=0, method="higher"))


def should_stop(value_M: Gains, rung: int, finished: Sequence[Gains]) -> bool:
    """Whether the optimistic bound is dominated by `WITNESSES` finished trials (hence by the front of all)."""
    bound_M = optimistic_bound(value_M, rung, finished)
    if bound_M is None:
        return False
    return sum(dominates(curve[-1], bound_M) for curve in finished) >= WITNESSES


def queue_order(values_NM: Gains) -> list[int]:
    """In which order trials that wait at the same rung run on: by non-dominated rank, lonely ones first within a rank.

    Args:
        values_NM: gains of the waiting trials at their rung.
    """
    rank_N = ranks(values_NM)
    lonely = np.zeros(len(values_NM))
    for rank in np.unique(rank_N):
        members = np.flatnonzero(rank_N == rank)
        lonely[members] = crowding(values_NM[members])
    return sorted(range(len(values_NM)), key=lambda index: (rank_N[index], -lonely[index], index))
