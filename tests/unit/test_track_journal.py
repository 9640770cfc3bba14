import math
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.track import events
from orchestrator.track.events import Metrics, Record, decode, encode
from orchestrator.track.journal import Journal, Position, StreamLock, read, records, restore_segments, segments, streams

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
numbers = st.floats(allow_nan=False)
bodies = st.one_of(
    st.builds(events.Params, st.dictionaries(names, names)),
    st.builds(events.Tags, st.dictionaries(names, names)),
    st.builds(Metrics, st.integers(0, 10**9), st.dictionaries(names, numbers)),
    st.builds(events.Artifact, names, names),
    st.builds(events.Dataset, names, names, names, names, st.dictionaries(names, names)),
    st.builds(events.Model, names, st.just({"depths": [1, 1, 6]}), names, aliases=st.tuples(names)),
    st.builds(events.State, st.sampled_from(events.STATES), names),
)


@given(bodies, st.integers(1, 10**6), st.integers(0, 10**13), st.integers(1, 99))
def test_a_record_survives_its_line(event, seq, ms, attempt):
    line = encode(Record(seq, ms, attempt, event))
    assert line.count(b"\n") == 1
    assert decode(line) == Record(seq, ms, attempt, event)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_stay_strict_json(value):
    line = encode(Record(1, 0, 1, Metrics(0, {"loss": value})))
    assert b'"loss":"' in line
    assert repr(decode(line).event.values["loss"]) == repr(value)


@given(bodies, st.data())
def test_any_torn_line_is_no_record(event, data):
    line = encode(Record(1, 0, 1, event))
    cut = data.draw(st.integers(0, len(line) - 2))
    assert decode(line[:cut]) is None


def test_segments_rotate_and_read_back_in_order(tmp_path):
    journal = Journal(tmp_path, 1, "rank0", segment_bytes=500)
    for step in range(100):
        journal.append(Metrics(step, {"loss": 1.0}))
    assert len(segments(journal.stream)) > 5
    assert all(path.stat().st_size < 700 for path in segments(journal.stream))
    assert [record.event.step for record in records(tmp_path)] == list(range(100))
    assert [record.seq for record in records(tmp_path)] == list(range(1, 101))


def test_reading_goes_on_where_it_ended_while_the_writer_writes(tmp_path):
    journal = Journal(tmp_path, 1, "rank0", segment_bytes=300)
    at, seen = Position(), []
    for step in range(30):
        journal.append(Metrics(step, {"loss": 1.0}))
        for line in read(journal.stream, at):
            seen.append(line.record.event.step)
            at = line.after
    assert seen == list(range(30))


def test_closed_segments_never_change_and_move_to_another_host(tmp_path):
    journal = Journal(tmp_path / "a", 1, "rank0")
    journal.append(Metrics(0, {"loss": 1.0}))
    first = journal.close_segment()
    held = first[0].read_bytes()
    journal.append(Metrics(1, {"loss": 1.0}))
    second = journal.close_segment()
    assert second[:1] == first
    assert first[0].read_bytes() == held
    assert journal.close_segment() == second  # nothing new, no empty segment
    journal.append(Metrics(2, {"loss": 1.0}))  # lost with the host
    committed = [(path.parent.name, path) for path in second]
    assert restore_segments(tmp_path / "b", committed) == 2
    assert restore_segments(tmp_path / "b", committed) == 0
    assert [record.event.step for record in records(tmp_path / "b")] == [0, 1]


def test_later_attempts_sort_after_earlier_ones(tmp_path):
    for attempt in (2, 10, 1):
        Journal(tmp_path, attempt, "rank0").append(Metrics(attempt, {"a": 1.0}))
    assert [record.attempt for record in records(tmp_path)] == [1, 2, 10]


def test_damage_inside_costs_only_its_own_line(tmp_path):
    journal = Journal(tmp_path, 1, "rank0")
    for step in range(3):
        journal.append(Metrics(step, {"loss": 1.0}))
    journal.close_segment()
    journal.append(Metrics(3, {"loss": 1.0}))
    (first, _) = segments(journal.stream)
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2][:-9])  # zeros after a power cut; a torn closed segment
    found = list(read(journal.stream))
    assert [line.record and line.record.event.step for line in found] == [0, None, None, 3]


WRITER = """
import sys, time
from pathlib import Path
from orchestrator.track.events import Metrics
from orchestrator.track.journal import Journal
journal = Journal(Path(sys.argv[1]), 1, "rank0", 2000)
step = 0
while True:
    journal.append(Metrics(step, {"loss": 1.0 / (step + 1)}))
    print(step, flush=True)
    step += 1
"""


def test_sigkill_loses_nothing_that_was_recorded(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        told = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    told = max([told, *(int(line) for line in writer.stdout.read().splitlines()[:-1])])
    writer.stdout.close()
    steps = [record.event.step for record in records(tmp_path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > told
    lock = StreamLock(streams(tmp_path)[0])
    assert lock.acquire()  # the kernel gave it back
    lock.release()


def test_a_living_writer_keeps_its_stream(tmp_path):
    journal = Journal(tmp_path, 1, "rank0")
    assert not StreamLock(journal.stream).acquire()
    journal.close()
    assert not StreamLock(journal.stream).acquire()  # its follower still ships
    journal.lock.release()
    assert StreamLock(journal.stream).acquire()
