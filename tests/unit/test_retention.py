"""Which checkpoints stay."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.retention import kept


def test_the_newest_stay():
    assert kept([10, 20, 30, 40], last=2, every_steps=0, best=-1) == {30, 40}


def test_the_first_of_every_range_stays():
    assert kept([10, 40, 52, 60, 99, 101, 110], last=1, every_steps=50, best=-1) == {52, 101, 110}


def test_the_best_stays():
    assert kept([10, 20, 30, 40], last=1, every_steps=0, best=20) == {20, 40}
    assert kept([30, 40], last=1, every_steps=0, best=20) == {40}


@given(st.sets(st.integers(0, 500), min_size=1), st.integers(1, 5), st.integers(0, 60), st.integers(-1, 500))
def test_retiring_step_by_step_keeps_what_retiring_at_once_keeps(steps, last, every, best):
    """Checkpoints are retired after every save: what an earlier retirement kept for good must stay kept."""
    alive = set()
    for step in sorted(steps):
        alive |= {step}
        alive = kept(sorted(alive), last, every, best)
    assert alive == kept(sorted(steps), last, every, best) - ({best} if best not in steps else set())
    assert max(steps) in alive
    assert len(alive) <= last + 2 + (max(steps) // every if every else 0)
