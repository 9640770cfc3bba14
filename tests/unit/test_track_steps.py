from hypothesis import given
from hypothesis import strategies as st

from orchestrator.track.steps import StepSet


@given(st.lists(st.integers(-50, 200), max_size=80))
def test_step_set_is_a_set(steps):
    ours, plain = StepSet(), set()
    for step in steps:
        assert ours.add(step) == (step not in plain)
        plain.add(step)
    assert len(ours) == len(plain)
    assert all((step in ours) == (step in plain) for step in range(-60, 210))


def test_regular_steps_cost_nothing():
    ours = StepSet()
    for step in range(0, 1_000_000, 10):
        ours.add(step)
    assert len(ours) == 100_000
    assert ours.pieces == 1


def test_a_changed_interval_costs_one_more_piece():
    ours = StepSet()
    for step in [*range(0, 1000, 10), *range(1003, 2000, 7)]:
        ours.add(step)
    assert ours.pieces <= 3
