import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orchestrator.sweep.front import dominates, front
from orchestrator.sweep.pruning import MIN_FINISHED, optimistic_bound, queue_order, should_stop


def curves(count):
    return arrays(np.float64, (count, 3, 2), elements=st.integers(0, 20).map(float))


@given(st.integers(0, MIN_FINISHED - 1).flatmap(curves))
def test_nothing_stops_before_eight_have_finished(finished):
    assert not should_stop(np.array([-1e9, -1e9]), 0, list(finished))


@given(st.integers(MIN_FINISHED, 30).flatmap(curves), st.integers(0, 2), st.integers(0, 20), st.integers(0, 20))
def test_a_trial_stops_exactly_when_two_finished_ones_dominate_its_bound(finished, rung, x, y):
    value = np.array([float(x), float(y)])
    bound = []
    for column in range(2):
        grown = sorted(curve[-1][column] - curve[rung][column] for curve in finished)
        # the smallest observed gain that at least 95 % of the steps between gains lie below
        bound.append(value[column] + grown[math.ceil(0.95 * (len(grown) - 1))])
    assert optimistic_bound(value, rung, list(finished)).tolist() == bound
    ends = [curve[-1] for curve in finished]
    expected = sum(dominates(end, np.array(bound)) for end in ends) >= 2
    assert should_stop(value, rung, list(finished)) == expected
    if expected:
        # then some front trial does too: what is not on the front is dominated by one that is
        assert any(dominates(ends[index], np.array(bound)) for index in front(np.stack(ends)))


@given(curves(9))
def test_a_finished_front_trial_would_never_have_stopped_at_its_end(finished):
    ends = np.stack([curve[-1] for curve in finished])
    for index in front(ends):
        assert not should_stop(ends[index], 2, list(finished))


def test_a_hopeless_trial_stops_and_a_slow_starter_does_not():
    finished = [np.array([[0.2, 1.0], [0.5, 1.0 + i / 10]]) for i in range(8)]
    assert should_stop(np.array([0.1, 0.9]), 0, finished)
    # its speed is beyond the front, however bad its accuracy is
    assert not should_stop(np.array([0.0, 1.8]), 0, finished)
    # gains of .3 may still bring it to .6
    assert not should_stop(np.array([0.3, 1.0]), 0, finished)


def test_the_queue_runs_better_ranks_first_and_then_lonely_ones():
    values = np.array([[1.0, 1.0], [3.0, 0.0], [2.0, 2.0], [0.0, 3.0], [2.1, 1.9]])
    order = queue_order(values)
    assert order[-1] == 0
    assert set(order[:2]) == {1, 3}
    assert sorted(order) == list(range(5))
