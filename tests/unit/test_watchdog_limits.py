"""How long a rank may be quiet: by what it does, and by how long its steps take."""

import threading
import time
from types import SimpleNamespace

import pytest

from orchestrator.train import hangs, watchdog
from orchestrator.train.config import GuardConfig
from orchestrator.train.ledger import CLASSES, Stopwatch
from orchestrator.train.watchdog import EXIT_HUNG, Watchdog

LIMITS = GuardConfig(hang_s=30, compile_s=1800, evaluate_s=3600, restore_s=7200)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def watching(config=LIMITS, **options):
    return Watchdog(config, SimpleNamespace(rank=0, world=1), Stopwatch(), **options)


def after_steps(clock, durations, **options):
    """A watchdog that has seen a first step and then steps of these seconds."""
    dog = watching(**options)
    dog.stepped(0)
    for number, seconds in enumerate(durations, start=1):
        clock.seconds += seconds
        dog.stepped(number)
    return dog


def test_every_class_has_a_limit_of_its_own(clock):
    dog = after_steps(clock, [1.0] * 5)
    limits = {phase: dog.limit(phase) for phase in (*CLASSES, "")}
    short = dict.fromkeys(("compute", "data", "lost", "checkpoint", ""), 30)
    assert limits == {**short, "compile": 1800, "evaluation": 3600, "restart": 7200}


def test_at_the_end_all_wait_for_storage(clock):
    dog = after_steps(clock, [1.0] * 5)
    dog.end()
    assert {dog.limit(phase) for phase in (*CLASSES, "")} == {7200}


def test_the_first_step_may_take_as_long_as_compiling(clock):
    dog = watching()
    assert dog.limit("compute") == 1800
    assert dog.limit("data") == 30
    dog.stepped(0)
    assert dog.limit("compute") == 30


def test_slow_steps_stretch_the_limit_to_ten_medians(clock):
    dog = after_steps(clock, [5.0] * 7)
    assert dog.limit("compute") == dog.limit("data") == 50
    assert dog.limit("compile") == 1800, "the larger of the two"
    assert after_steps(clock, [400.0] * 5).limit("compile") == 4000
    assert after_steps(clock, [400.0] * 5).limit("evaluation") == 4000
    assert after_steps(clock, [1000.0] * 5).limit("restart") == 7200, "what is no step has nothing to do with steps"


def test_one_slow_step_does_not_stretch_it(clock):
    assert after_steps(clock, [1.0, 1.0, 900.0, 1.0, 1.0]).limit("compute") == 30


def test_only_the_last_hundred_and_one_steps_count(clock):
    assert after_steps(clock, [10.0] * 200).limit("data") == 100
    assert after_steps(clock, [10.0] * 200 + [1.0] * 101).limit("data") == 30


def test_the_time_up_to_the_first_step_is_no_step(clock):
    dog = watching()
    clock.seconds = 900
    dog.stepped(0)
    assert dog.limit("compute") == 30


def test_patience_with_storage_counts_for_all_that_wait_for_data(clock):
    dog = after_steps(clock, [1.0] * 5, patience_s=660)
    assert dog.limit("data") == dog.limit("compute") == 660
    assert dog.limit("compile") == 1800


@pytest.mark.parametrize(("phase", "ends"), [("compute", True), ("data", True), ("evaluation", False)])
def test_the_thread_keeps_to_the_limit_of_the_phase(monkeypatch, phase, ends):
    """In real time: a phase with the short limit ends, one with a longer limit is left alone."""
    config = GuardConfig(hang_s=0.2, compile_s=60, evaluate_s=60, restore_s=60)
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(Watchdog, "_hung", lambda self, _: self._end(EXIT_HUNG))
    watch = Stopwatch()
    dog = Watchdog(config, SimpleNamespace(rank=0, world=1), watch, end=lambda code: (codes.append(code), ended.set()))
    dog.stepped(0)
    dog.start()
    try:
        with watch.span(phase):
            assert ended.wait(5 if ends else 1) is ends
    finally:
        dog.close()
    assert codes == [EXIT_HUNG] * ends


def test_signs_of_life_keep_a_rank_alive(monkeypatch):
    config = GuardConfig(hang_s=0.5)
    codes = []
    monkeypatch.setattr(Watchdog, "_hung", lambda self, _: self._end(EXIT_HUNG))
    watch = Stopwatch()
    dog = Watchdog(config, SimpleNamespace(rank=0, world=1), watch, end=codes.append)
    dog.stepped(0)
    dog.start()
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        with watch.span("data"):
            time.sleep(0.02)
    dog.close()
    assert codes == []


def report(rank, **changed):
    facts = {"phase": "compute", "quiet_s": 40.0, "limit_s": 30.0, "step": 7, "samples": [1, 2], "collective": "losses"}
    return hangs.Report(
        rank=rank, world=3, **{**facts, "collectives": 9, "thread": 0, "stacks": "stacks of a rank", **changed}
    )


def test_the_slowest_rank_is_the_one_with_the_fewest_collective_calls(tmp_path):
    folder = hangs.Folder(str(tmp_path))
    for one in (report(0), report(1, collectives=8, collective="gradients of step 7"), report(2)):
        hangs.write(folder, "0001", one)
    told = hangs.tell(folder, "0001")
    assert "rank 1 of 3: 40 s in compute (limit 30 s) after step 7" in told
    assert "last collective call: gradients of step 7 (number 8)" in told
    assert "rank 0 of 3" not in told


def test_storage_that_hangs_does_not_keep_a_hung_rank(monkeypatch):
    """Its report cannot be written and raises nothing; the rank ends all the same."""
    monkeypatch.setattr(watchdog, "TELLING_S", 0.2)
    monkeypatch.setattr(hangs, "write", lambda *_: threading.Event().wait())
    ended = []
    run = SimpleNamespace(rank=0, world=1, folder=None)
    dog = Watchdog(GuardConfig(hang_s=0.1), run, Stopwatch(), end=ended.append)
    dog.position.step = 0
    dog.start()
    dog._thread.join(30)
    assert ended == [EXIT_HUNG]
