"""What it is worth to train a trial to its end: the hypervolume that it is expected to add.

Hypervolume is written as a mean over directions (Golovin and Zhang 2020, arXiv 2006.04655): of the points y above the
reference, the volume that they dominate is proportional to the mean over unit vectors d of the largest
min(y_1 / d_1, ..., y_M / d_M)^M. What a point would add is then a difference of two numbers per direction, for any
number of objectives and for thousands of candidates at once. The expectation is a mean over fixed quasi-random draws of
the forecast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, qmc

from orchestrator.sweep.front import Gains, front

Array = npt.NDArray[np.float64]
Allowed = Callable[[Array], npt.NDArray[np.bool_]]
"""Points [..., M] -> whether each keeps every limit, [...]."""

DIRECTIONS, DRAWS = 48, 16
SHORTLIST = 200
"""Candidates that are looked at in full; the others are worse even when they turn out a deviation better."""
MARGIN = 0.1
"""How far below the nadir of the forecast front the reference point lies, in widths of that front."""


def expected(mean_NM: Gains, deviation_NM: Array, held_KM: Gains, goals: int, allowed: Allowed) -> Array:
    """Share of a box around the forecast front that each candidate is expected to add, [N].

    Args:
        mean_NM: forecast ends of the candidates; the first columns are the objectives, more is better.
        deviation_NM: their standard deviations.
        held_KM: forecast ends of the trials that have finished, or will.
        goals: number of objectives.
        allowed: whether points keep every limit.
    """
    everything = np.concatenate([mean_NM, held_KM])
    kept = everything[allowed(everything)]
    ends = (kept if len(kept) else everything)[:, :goals]
    best = ends[front(ends)]
    width_M = np.maximum(np.ptp(best, axis=0), 1e-9)
    reference_M = best.min(0) - MARGIN * width_M

    def reach(points: Array) -> Array:
        return _reach((points[..., :goals] - reference_M) / width_M)

    held = held_KM[allowed(held_KM)]
    reached_J = reach(held).max(0) if len(held) else np.zeros(DIRECTIONS)
    hopeful_N = np.maximum(reach(mean_NM + deviation_NM) - reached_J, 0).mean(1)
    short = np.argsort(-hopeful_N, kind="stable")[:SHORTLIST]
    points_SNM = mean_NM[short] + deviation_NM[short] * _draws(mean_NM.shape[1])[:, None]
    added_SNJ = np.maximum(reach(points_SNM) - reached_J, 0) * allowed(points_SNM)[..., None]
    found = np.zeros(len(mean_NM))
    found[short] = added_SNJ.mean((0, 2))
    return found


def _reach(above: Array) -> Array:
    """min(y / d)^M per direction, [..., J], of points above the reference [..., M]."""
    goals = above.shape[-1]
    scaled: Array = (np.maximum(above, 0)[..., None, :] / _directions(goals)).min(-1) ** goals
    return scaled


@functools.cache
def _directions(goals: int) -> Array:
    """Unit vectors of positive numbers, evenly spread, [J, M]."""
    if goals == 2:
        angle = (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    normal = np.maximum(np.abs(_draws(goals, DIRECTIONS)), 1e-9)
    return np.asarray(normal / np.linalg.norm(normal, axis=1, keepdims=True))


@functools.cache
def _draws(columns: int, count: int = DRAWS) -> Array:
    """Quasi-random standard normal numbers, [count, columns]."""
    # the first point of the sequence is 0, whose normal is minus infinity
    return np.asarray(norm.ppf(qmc.Halton(columns, scramble=False).random(count + 1)[1:]))
