"""The goodput ledger: no second twice, none as a remainder, restarts and redone steps where they belong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.train.ledger import CLASSES, Ledger, Stopwatch, Trace, resumed


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_an_inner_span_stops_the_outer():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.span("compute"):
        clock.now += 2
        with watch.span("checkpoint"):
            clock.now += 3
        clock.now += 1
    clock.now += 0.5
    taken = watch.take()
    assert (taken["compute"], taken["checkpoint"], taken["elapsed"]) == (3, 3, 6.5)


def test_a_span_that_is_open_while_it_is_read_goes_on():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.span("evaluation"):
        clock.now += 2
        assert watch.take()["evaluation"] == 2
        clock.now += 1
    assert watch.take() == {**dict.fromkeys(CLASSES, 0.0), "evaluation": 1, "elapsed": 1}


@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.floats(0, 10), st.floats(0, 1)), max_size=30))
def test_everything_adds_up(spans):
    clock, ledger = Clock(), Ledger()
    watch = Stopwatch(clock)
    gaps = 0.0
    for name, inside, outside in spans:
        with watch.span(name):
            clock.now += inside
        clock.now += outside
        gaps += outside
        ledger.add(watch.take())
    assert ledger.elapsed == pytest.approx(clock.now - 100, abs=1e-6)
    assert ledger.unaccounted == pytest.approx(gaps, abs=1e-6)
    if ledger.elapsed:
        assert sum(ledger.fractions().values()) == pytest.approx(1)


def ledger(**seconds):
    return Ledger({**dict.fromkeys(CLASSES, 0.0), **seconds}, sum(seconds.values()))


def test_redone_steps_are_lost_work_and_the_pause_is_restart():
    saved = ledger(compute=10, data=1, checkpoint=1)
    dead = Trace(ledger(compute=14, data=2, checkpoint=1, evaluation=3), step=12, at=1000.0, world=2)
    now = resumed(saved, 8, dead, 1005.0)
    assert now.seconds["lost"] == 5
    assert now.seconds["compute"] == 10
    assert now.seconds["data"] == 1
    assert now.seconds["evaluation"] == 3
    assert now.seconds["restart"] == 10  # two ranks waited five seconds
    assert now.unaccounted == pytest.approx(0)
    assert (now.restarts, now.redone_steps) == (1, 4)
    assert dead.ledger.seconds["compute"] == 14, "the argument is not changed"


def test_a_graceful_stop_is_no_restart():
    saved = ledger(compute=10)
    now = resumed(saved, 8, Trace(ledger(compute=10, checkpoint=2), 8, 1000.0, 2, ended=True), 90_000.0)
    assert now.seconds["restart"] == 0
    assert (now.restarts, now.redone_steps) == (0, 0)
    assert now.elapsed == 12


def test_a_first_start_has_no_past():
    assert resumed(Ledger(), 0, None, 5.0) == Ledger()


def test_what_a_process_takes_to_its_engine_is_start():
    first = resumed(Ledger(), 0, None, 1000.0, late_s=7.0, world=2)
    assert (first.seconds["restart"], first.elapsed, first.restarts) == (14, 14, 0)
    stopped = Trace(ledger(compute=10), 8, 900.0, 4, ended=True)
    again = resumed(ledger(compute=9), 8, stopped, 1000.0, late_s=7.0, world=2)
    assert (again.seconds["restart"], again.elapsed, again.restarts) == (14, 24, 0)


def test_no_second_of_a_start_is_counted_twice():
    """The new process came up within the pause."""
    dead = Trace(ledger(compute=10), 8, 990.0, 2)
    again = resumed(ledger(compute=10), 8, dead, 1000.0, late_s=7.0, world=2)
    assert (again.seconds["restart"], again.elapsed, again.restarts) == (20, 30, 1)


def test_a_clock_that_was_set_back_takes_nothing_away():
    assert resumed(Ledger(), 0, None, 1000.0, late_s=-3.0, world=2) == Ledger()


def test_traces_survive_storage():
    trace = Trace(ledger(compute=10), 8, 1000.0, 2)
    assert Trace.loads(trace.dumps()) == trace


def test_the_line_names_what_happened():
    assert ledger(compute=3, data=1).describe() == "compute 75.0 %, data wait 25.0 %, unaccounted 0.0 %"
