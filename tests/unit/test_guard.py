"""The collapse guard: stops what has collapsed, lets recover what has not, survives a restart."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itpn_core.errors import CollapseError
from itpn_core.pretraining.guard import CollapseGuard


def run(guard, values, every=1):
    for index, value in enumerate(values):
        guard.update(index * every, {"p16": value})


def test_stops_after_patience_low_steps():
    guard = CollapseGuard(0.1, 100)
    run(guard, [1.0] + [0.09] * 100)
    with pytest.raises(CollapseError, match=r"features of p16 have collapsed.*objective.ema_predictor"):
        guard.update(101, {"p16": 0.09})


@pytest.mark.parametrize("every", [1, 10, 50, 100])
def test_patience_counts_steps_not_measurements(every):
    guard = CollapseGuard(0.1, 100)
    with pytest.raises(CollapseError) as caught:
        run(guard, [1.0] + [0.01] * 1000, every)
    assert f"for {100} steps (since step {every})" in str(caught.value)


def test_recovery_starts_the_count_again():
    guard = CollapseGuard(0.1, 100)
    run(guard, [1.0] + ([0.05] * 99 + [0.2]) * 5)


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=300))
def test_never_stops_above_the_threshold(values):
    run(CollapseGuard(0.1, 2), [1.0, *values])


@pytest.mark.parametrize("bad", [math.nan, 0.0])
def test_not_a_number_and_zero_count_as_collapsed(bad):
    with pytest.raises(CollapseError):
        run(CollapseGuard(0.1, 5), [1.0] + [bad] * 10)


def test_features_that_start_at_zero_are_a_collapse():
    with pytest.raises(CollapseError):
        run(CollapseGuard(0.1, 5), [0.0] * 10)


def test_one_level_is_enough_and_is_named():
    guard = CollapseGuard(0.1, 3)
    for step in range(4):
        guard.update(step, {"p16": 1.0, "p4": 0.001 if step else 1.0})
    with pytest.raises(CollapseError, match="features of p4 have"):
        guard.update(4, {"p16": 1.0, "p4": 0.001})


def test_state_survives_a_restart():
    whole, first = CollapseGuard(0.1, 100), CollapseGuard(0.1, 100)
    values = [1.0] + [0.01] * 60
    run(whole, values)
    run(first, values)
    second = CollapseGuard(0.1, 100)
    second.load(first.state())
    assert second == whole
