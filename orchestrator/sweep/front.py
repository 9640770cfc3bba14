"""Several objectives at once: who beats whom, the front, its hypervolume, and the points a person would choose.

All functions are pure and small enough to be held to a plain version by tests. Inside, every objective grows: `gains`
turns measured values round where less is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from itpn_core.errors import ConfigError

Gains = npt.NDArray[np.float64]
"""[N, M]: N points, M objectives, more is better in all of them."""

UP, DOWN = "up", "down"


@dataclass(frozen=True)
class Objective:
    """Something to measure and the direction that is wanted.

    Raises:
        ConfigError: a direction that is neither up nor down.
    """

    name: str
    direction: str = UP

    def __post_init__(self) -> None:
        if self.direction not in (UP, DOWN):
            raise ConfigError(f"sweep.objectives.{self.name}", self.direction, "must be up or down")

    @property
    def sign(self) -> float:
        """1 when more is better, else -1."""
        return 1.0 if self.direction == UP else -1.0


def gains(points: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Gains:
    """Measured values as an array in which more is always better.

    Args:
        points: objective name -> value, each finite.
        objectives: the order of the columns.
    """
    rows = [[objective.sign * point[objective.name] for objective in objectives] for point in points]
    return np.array(rows, dtype=np.float64).reshape(len(points), len(objectives))


def dominates(first_M: Gains, second_M: Gains) -> bool:
    """Whether the first is at least as good everywhere and better somewhere."""
    return bool(dominated(second_M[None], first_M[None])[0])


def dominated(points_NM: Gains, by_KM: Gains) -> npt.NDArray[np.bool_]:
    """Bool [N]: whether some row of the second array dominates the point."""
    as_good_NK = np.all(by_KM[None] >= points_NM[:, None], axis=2)
    better_NK = np.any(by_KM[None] > points_NM[:, None], axis=2)
    return np.asarray(np.any(as_good_NK & better_NK, axis=1))


def front(points_NM: Gains) -> list[int]:
    """Indices of the points that no other dominates; equal points are all in."""
    if points_NM.shape[1] == 2:
        return _front_of_two(points_NM)
    return [int(index) for index in np.flatnonzero(~dominated(points_NM, points_NM))]


def _front_of_two(points_N2: Gains) -> list[int]:
    """By sorting, so that a table of 100,000 settings is no burden."""
    order = np.lexsort((-points_N2[:, 1], -points_N2[:, 0]))
    found: list[int] = []
    for index in order:
        if found and points_N2[index, 1] <= points_N2[found[-1], 1]:
            if (points_N2[index] == points_N2[found[-1]]).all():
                found.append(int(index))
            continue
        found.append(int(index))
    return sorted(found)


def ranks(points_NM: Gains) -> npt.NDArray[np.int64]:
    """Non-dominated rank of every point: 0 on the front, 1 on the front of the rest, and so on; int64 [N]."""
    rank_N = np.full(len(points_NM), -1, dtype=np.int64)
    left = np.arange(len(points_NM))
    level = 0
    while len(left):
        best = left[front(points_NM[left])]
        rank_N[best] = level
        left = np.setdiff1d(left, best)
        level += 1
    return rank_N


def hypervolume(points_NM: Gains, reference_M: Gains) -> float:
    """Volume that the points dominate above a reference point; points that do not exceed it everywhere add nothing.

    Exact. Two objectives are summed in strips; more are cut in slices along the last one (hypervolume by slicing
    objectives), which is quick for the tens of front points that a sweep has.
    """
    above = points_NM[(points_NM > reference_M).all(1)] - reference_M
    return _volume(above[front(above)] if len(above) else above)


def _volume(points_NM: Gains) -> float:
    """Volume above the origin of positive points."""
    if not len(points_NM):
        return 0.0
    if points_NM.shape[1] == 1:
        return float(points_NM.max())
    order = np.argsort(-points_NM[:, -1], kind="stable")
    points = points_NM[order]
    # from the highest slice down: what stands above it so far, times its thickness
    lower = np.append(points[1:, -1], 0.0)
    if points.shape[1] == 2:
        widths = np.maximum.accumulate(points[:, 0])
        return float((widths * (points[:, 1] - lower)).sum())
    total = 0.0
    for count, thickness in enumerate(points[:, -1] - lower, start=1):
        if thickness > 0:
            slab = points[:count, :-1]
            total += thickness * _volume(slab[front(slab)])
    return total


def nadir(points_NM: Gains) -> Gains:
    """The worst value of every objective on the points' front, [M]."""
    return np.asarray(points_NM[front(points_NM)].min(0))


def crowding(points_NM: Gains) -> npt.NDArray[np.float64]:
    """Crowding distance of NSGA-II among all given points; the extremes have an infinite one; float64 [N]."""
    distance_N = np.zeros(len(points_NM))
    for column in points_NM.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distance_N[order[[0, -1]]] = np.inf
        if width > 0 and len(order) > 2:
            distance_N[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance_N


def knee(points_NM: Gains) -> int:
    """Index of the front point farthest above the plane through the front's extremes, every objective scaled to 0..1.

    With two objectives this is the largest distance to the chord. Equal points: the first.
    """
    on_front = front(points_NM)
    values = points_NM[on_front]
    low, width = values.min(0), values.max(0) - values.min(0)
    scaled = (values - low) / np.where(width > 0, width, 1.0)
    return on_front[int(np.argmax(scaled.sum(1)))]


def best_within(points_NM: Gains, column: int, guard: int, floor: float) -> int | None:
    """The point that is best in one objective among those of at least `floor` in another; ties by the guard's value.

    "Fastest within Y of the baseline" is `best_within(gains, speed, accuracy, baseline - Y)`.
    """
    allowed = np.flatnonzero(points_NM[:, guard] >= floor)
    if not len(allowed):
        return None
    return int(max(allowed, key=lambda index: (points_NM[index, column], points_NM[index, guard])))


def best(points_NM: Gains, column: int) -> int:
    """The point that is best in one objective; ties by the sum of the others, scaled."""
    width = np.ptp(points_NM, axis=0)
    others = (points_NM / np.where(width > 0, width, 1.0)).sum(1)
    return int(max(range(len(points_NM)), key=lambda index: (points_NM[index, column], others[index])))


def separated(low_M: Gains, high_M: Gains, other_low_M: Gains, other_high_M: Gains) -> bool:
    """Whether two points' intervals are apart in at least one objective."""
    return bool(np.any(np.logical_or(low_M > other_high_M, other_low_M > high_M), axis=0))


def distinct(points_NM: Gains, low_NM: Gains, high_NM: Gains, order_by: int = 0) -> list[int]:
    """Front points that can be told apart: walking along the front, each is separated from all that count already.

    Args:
        points_NM: measured values.
        low_NM: lower ends of their intervals, in gains.
        high_NM: upper ends.
        order_by: objective along which the front is walked, best first.

    Returns:
        Indices in walking order; the first front point always counts.
    """
    found: list[int] = []
    for index in sorted(front(points_NM), key=lambda i: -points_NM[i, order_by]):
        if all(separated(low_NM[index], high_NM[index], low_NM[other], high_NM[other]) for other in found):
            found.append(index)
    return found
