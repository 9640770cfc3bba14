import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from itpn_core.errors import ConfigError
from orchestrator.sweep.front import (
    Objective,
    best,
    best_within,
    crowding,
    distinct,
    dominated,
    dominates,
    front,
    gains,
    hypervolume,
    knee,
    nadir,
    ranks,
    separated,
)


def clouds(objectives=None, most=12, high=6):
    """Small integer coordinates, so that ties and duplicates are common."""
    sizes = st.tuples(st.integers(1, most), st.just(objectives) if objectives else st.integers(1, 4))
    return sizes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.integers(0, high).map(float)))


def plain_dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def plain_front(points):
    return [i for i, p in enumerate(points) if not any(plain_dominates(q, p) for q in points)]


def plain_hypervolume(points, reference):
    """Counts unit cells of the integer lattice, each dominated or not."""
    cells = itertools.product(*(range(int(r), 8) for r in reference))
    return sum(any(all(p[d] >= c[d] + 1 for d in range(len(c))) for p in points) for c in cells)


@given(clouds())
def test_front_is_what_nobody_dominates(points):
    assert front(points) == plain_front(points)


@given(clouds())
def test_dominance_is_the_plain_one(points):
    for a, b in itertools.product(points, points):
        assert dominates(a, b) == plain_dominates(a, b)
    assert dominated(points, points[:3]).tolist() == [any(plain_dominates(q, p) for q in points[:3]) for p in points]


@given(clouds())
def test_ranks_peel_fronts_off(points):
    rank_N = ranks(points)
    left = list(range(len(points)))
    for level in range(int(rank_N.max()) + 1):
        peeled = [left[i] for i in plain_front(points[left])]
        assert sorted(np.flatnonzero(rank_N == level)) == peeled
        left = [i for i in left if i not in peeled]
    assert not left


@settings(max_examples=60)
@given(clouds(most=7, high=5), st.integers(0, 2))
def test_hypervolume_counts_the_dominated_cells(points, reference):
    corner = np.full(points.shape[1], float(reference))
    assert hypervolume(points, corner) == pytest.approx(plain_hypervolume(points, corner))


@given(clouds(objectives=2), st.permutations(range(12)))
def test_hypervolume_ignores_order_scale_and_dominated_points(points, shuffle):
    corner = np.zeros(2)
    value = hypervolume(points, corner)
    order = [i for i in shuffle if i < len(points)]
    assert hypervolume(points[order], corner) == pytest.approx(value)
    assert hypervolume(points[front(points)], corner) == pytest.approx(value)
    assert hypervolume(points * [2.0, 0.5], corner) == pytest.approx(value)


def test_points_below_the_reference_add_nothing():
    assert hypervolume(np.array([[3.0, -1.0], [0.0, 5.0]]), np.zeros(2)) == 0.0


def test_gains_turn_objectives_that_should_fall():
    objectives = (Objective("accuracy"), Objective("memory", "down"))
    rows = gains([{"memory": 3.0, "accuracy": 0.5, "other": 9.0}], objectives)
    assert rows.tolist() == [[0.5, -3.0]]
    with pytest.raises(ConfigError, match=r"sweep.objectives.speed = 'sideways': must be up or down"):
        Objective("speed", "sideways")


def test_nadir_is_the_worst_of_the_front_not_of_all():
    assert nadir(np.array([[0.0, 4.0], [3.0, 1.0], [0.0, 0.0]])).tolist() == [0.0, 1.0]


def test_knee_is_the_bulge():
    points = np.array([[0.0, 10.0], [8.0, 9.0], [9.0, 4.0], [10.0, 0.0], [1.0, 1.0]])
    assert knee(points) == 1
    assert knee(np.array([[2.0, 2.0]])) == 0


@given(clouds(objectives=2))
def test_knee_lies_on_the_front_farthest_from_the_chord(points):
    on_front = plain_front(points)
    chosen = knee(points)
    assert chosen in on_front
    values = points[on_front]
    first, last = values[np.argmin(values[:, 0])], values[np.argmax(values[:, 0])]
    width = np.where(np.ptp(values, axis=0) > 0, np.ptp(values, axis=0), 1.0)
    chord = (last - first) / width
    distance = [abs(chord[0] * ((p - first) / width)[1] - chord[1] * ((p - first) / width)[0]) for p in values]
    above = [((p - first) / width).sum() for p in values]
    mine = on_front.index(chosen)
    assert above[mine] == pytest.approx(max(above))
    # below the chord is the other kind of far
    assert distance[mine] == pytest.approx(max(d for d, a in zip(distance, above, strict=True) if a > -1e-9))


def test_choices_of_a_person():
    points = np.array([[1.0, 0.90], [2.0, 0.89], [3.0, 0.80], [2.0, 0.70], [0.5, 0.90]])
    assert best_within(points, column=0, guard=1, floor=0.88) == 1
    assert best_within(points, column=0, guard=1, floor=0.95) is None
    assert best(points, 1) == 0
    assert best(points, 0) == 2


def test_crowding_prefers_lonely_points():
    distance = crowding(np.array([[0.0, 4.0], [1.0, 3.0], [1.2, 2.8], [4.0, 0.0]]))
    assert np.isinf(distance[[0, 3]]).all()
    assert distance[2] > distance[1]


def test_distinct_points_need_a_gap_in_one_objective():
    points = np.array([[4.0, 1.0], [3.9, 1.1], [2.0, 1.2], [1.0, 1.15]])
    half = np.array([0.2, 0.3])
    low, high = points - half, points + half
    # the second overlaps the first in both; the last is no front point
    assert distinct(points, low, high) == [0, 2]
    assert distinct(points, points - 1e-3, points + 1e-3) == [0, 1, 2]


@given(clouds(objectives=2), st.floats(0.0, 3.0))
def test_distinct_points_are_pairwise_separated(points, half):
    found = distinct(points, points - half, points + half)
    assert found
    for a, b in itertools.combinations(found, 2):
        assert separated(points[a] - half, points[a] + half, points[b] - half, points[b] + half)
    if half == 0.0:
        assert len(found) == len({tuple(points[i]) for i in front(points)})
