"""What a launch does about trouble, without a cluster: failures, refusals, states of a run."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from itpn_core.errors import UserError, WeightsError
from orchestrator import launch
from orchestrator.checkpoint.runlog import FencedError, RunLog
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.folder import Folder
from orchestrator.launch import waiting as waiting_module
from orchestrator.launch.board import NOTHING, Admission, Board, BoardClient, Group, News, Progress, watch
from orchestrator.launch.cluster import Resources
from orchestrator.launch.config import ClusterConfig
from orchestrator.launch.evaluations import looking
from orchestrator.launch.failure import Complaint, backoff_seconds, first_failure, root_cause
from orchestrator.launch.lease import Lease
from orchestrator.launch.record import KEY, Lifecycle, RunRecord, open_record
from orchestrator.launch.run import _Attempt
from orchestrator.launch.say import say
from orchestrator.launch.show import ProgressLine
from orchestrator.launch.stops import Stops
from orchestrator.launch.waiting import Waiting
from orchestrator.launch.worker import RayContext, train_worker
from orchestrator.train.context import PREEMPTED
from orchestrator.train.results import Request


def at(board, step):
    board.post(News(Progress("training", step=step)))


# -- who failed first --------------------------------------------------------------------------------------------------


def test_the_first_complaint_is_the_cause_and_not_the_lowest_rank():
    complaints = [Complaint(3, "h3", "ValueError: bad"), Complaint(0, "h0", "RuntimeError: Connection closed by peer")]
    found = first_failure({0: "…\nRuntimeError: Connection closed by peer", 3: "…\nValueError: bad"}, complaints)
    assert found == "rank 3 on h3: ValueError: bad"


def test_a_rank_that_was_killed_comes_before_those_who_complain_about_it():
    complaints = [Complaint(0, "h0", "RuntimeError: Connection closed by peer")]
    found = first_failure({0: "x", 2: "A worker health check failed.\nThe actor died unexpectedly"}, complaints)
    assert found.startswith("rank 2: its process ended without a word")
    assert found.endswith("The actor died unexpectedly")


def test_without_a_board_the_words_of_ray_are_used():
    error = RuntimeError("wrapping")
    error.worker_failures = {1: ValueError("trace\nback\nValueError: x"), 2: ValueError("y")}
    assert root_cause(error) == "rank 1: ValueError: x"
    assert root_cause(ValueError("a\nb")) == "b"
    assert root_cause(None) == "None"


def test_pauses_grow_only_while_there_is_no_progress():
    assert [backoff_seconds(n) for n in range(8)] == [0, 5, 10, 20, 40, 80, 120, 120]
    board = Board(max_failures=10)
    waits = []
    for step in (5, 5, 5, 9, 9):
        at(board, step)
        board.failed({0: "x"})
        board.failed({0: "x"})  # Ray's controller tells of the same failure again
        waits.append(board.admit().wait_s)
    assert waits == [0, 5, 10, 0, 5]
    at(board, 12)
    assert board.admit().wait_s == 0  # a resize after progress is no failure
    notes = board.read().notes
    assert len(notes) == 5
    assert "starts again from the last checkpoint, in 10 s (failure 3 of at most 10)" in notes[2]


def test_the_last_failure_is_left_to_the_driver():
    board = Board(max_failures=1)
    for _ in range(2):
        board.admit()
        board.complain(Complaint(1, "h", "ValueError: x"))
        board.failed({1: "x"})
    assert len(board.read().notes) == 1
    assert board.end() == ("rank 1 on h: ValueError: x", board.admit())


def test_a_verdict_ends_every_later_group():
    board = Board(max_failures=3)
    board.refuse("the data are away", 4)
    board.refuse("somebody is away", 1)  # because of the first
    board.failed({0: "x"})
    assert board.read().notes == []
    assert board.admit() == Admission(refusal="the data are away", exit_code=4)


def test_the_board_knows_whether_a_group_runs_and_for_how_long_it_was_silent():
    board = Board(max_failures=3)
    assert board.group()[0] is False
    board.admit()
    running, silent, refused, _ = board.group()
    assert running
    time.sleep(0.05)
    assert board.group().silent_s >= silent + 0.05
    assert refused == board.group().refused_s == 0
    board.refuse("the data are away", 4)
    time.sleep(0.05)
    assert board.group().refused_s >= 0.05
    assert board.admit().open_s >= 0.05, "counted from the board's own birth, also for later groups"
    board.post(News(None))
    assert board.group()[1] < 0.05
    board.failed({0: "x"})
    board.post(News(None))  # last words
    assert board.group()[0] is False


class Answers:
    """A board as Ray gives it to the driver."""

    def __init__(self, group):
        self.group = SimpleNamespace(remote=lambda: group)


@pytest.mark.parametrize(
    ("refused_s", "closing", "over"), [(10, False, False), (30, False, True), (30, True, False), (400, True, True)]
)
def test_a_rank_0_that_still_saves_is_not_cut_off_by_a_refusal(monkeypatch, refused_s, closing, over):
    monkeypatch.setattr(waiting_module.ray, "get", lambda answer, timeout: answer)
    group = Group(running=True, silent_s=0.1, refused_s=refused_s, closing=closing)
    assert Waiting(Answers(group), None, 1000.0).over(stop=False) is over


def test_the_board_knows_that_rank_0_is_closing():
    board = Board()
    board.post(News(Progress("training")))
    assert not board.group().closing
    board.post(News(Progress("closing")))
    assert board.group().closing
    board.post(News(Progress("refused")))
    assert not board.group().closing


def test_news_are_told_until_the_driver_has_them_and_a_stop_request_reaches_rank_0():
    board = Board()
    assert board.post(News(None, ["a"], [("running", "")])) == ""
    board.stop("SIGTERM")
    assert board.post(News(Progress("training", step=1), ["b"], requests=[Request(1)])) == "SIGTERM"
    everything = News(Progress("training", step=1), ["a", "b"], [("running", "")], [Request(1)])
    assert board.read() == board.read() == everything, "the first answer may have got lost"
    known = NOTHING.plus(everything)
    assert board.read(known) == News(Progress("training", step=1))
    board.post(News(None, ["c"]))
    assert board.read(known).notes == ["c"]


# -- the driver's threads ----------------------------------------------------------------------------------------------


class Local:
    """An actor's handle whose methods run here and now; answers to `lost` get lost on the way back."""

    def __init__(self, actor, lost=()):
        self._actor, self._lost = actor, list(lost)

    def __getattr__(self, name):
        def remote(*arguments):
            found = getattr(self._actor, name)(*arguments)
            if name in self._lost:
                self._lost.remove(name)
                return GetTimeoutError("no answer")
            return found

        return SimpleNamespace(remote=remote)


@pytest.fixture
def here(monkeypatch):
    """`ray.get` of what `Local` answers."""

    def get(found, timeout=None):
        if isinstance(found, Exception):
            raise found
        return found

    for room in (launch.board, launch.waiting, launch.worker, launch.run):
        monkeypatch.setattr(room.ray, "get", get)


def read_for(board, seconds, *takers):
    """Watches a board for a while, on this thread."""
    done = threading.Event()
    threading.Timer(seconds, done.set).start()
    watch(board, takers, done, 0.02)


def test_whatever_goes_wrong_with_news_the_watch_goes_on_and_loses_none(here, caplog):
    board, got = Board(), []
    board.post(News(None, ["a"], [("running", "")], [Request(1)]))

    def full(news):
        if not got:
            board.post(News(None, ["b"]))
        got.append(news)
        raise OSError(28, "No space left on device")

    def broken(news):
        raise KeyError("never thought of")

    seen = []
    read_for(Local(board, ["read"]), 0.3, broken, full, seen.append)
    assert [news.notes for news in seen if news.notes] == [["a"], ["b"]]
    assert [request for news in seen for request in news.requests] == [Request(1)]
    assert got == seen
    assert len(caplog.records) == 2, "once for each kind of error"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("I/O operation on closed file")])
def test_trouble_with_printing_is_none_of_the_run(error, monkeypatch):
    line = ProgressLine(Broken(error))
    line(News(Progress("training", 1, 2), ["a note"]))
    line.close()
    monkeypatch.setattr("sys.stdout", Broken(error))
    monkeypatch.setattr("sys.stderr", Broken(error))
    say("words")
    say("words", error=True)


def test_a_reader_that_has_seen_enough_changes_no_exit_code(tmp_path):
    """Else the interpreter ends with 120, as it tries again to print what it could not."""
    lines = "from orchestrator.launch.say import say, settle; [say('x' * 1000) for _ in range(200)]; settle()"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", lines], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, b"")


def test_rank_0_goes_on_talking_after_an_error_of_its_line(here, monkeypatch):
    board = Board()
    post, trouble = board.post, [RuntimeError("never thought of")]
    board.post = lambda news: post(news) if not trouble else (_ for _ in ()).throw(trouble.pop())
    client = BoardClient(Local(board), poll_s=0.02)
    client.note("a")
    deadline = time.monotonic() + 30
    while board.read().notes != ["a"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not trouble
    client.close()


def test_evaluations_are_looked_after_whatever_a_look_raises(monkeypatch):
    monkeypatch.setattr(launch.evaluations, "_LOOK_S", 0.01)
    looks, again = [], threading.Event()

    def look():
        looks.append(1)
        if len(looks) > 2:
            again.set()
        raise KeyError("never thought of")

    with looking(SimpleNamespace(look=look, close=list)):
        assert again.wait(30)


# -- one rank alone ----------------------------------------------------------------------------------------------------


def test_a_rank_that_refuses_leaves_its_words_and_the_driver_ends_the_group_that_waits_for_it(here, monkeypatch):
    board, now = Board(), [1000.0]
    monkeypatch.setattr(launch.board.time, "monotonic", lambda: now[0])
    waiting = Waiting(Local(board), Resources(2, 1.0, 0), 900.0)
    board.admit()
    alone = SimpleNamespace(rank=1, progress=lambda stage: None)
    assert launch.worker._refused(Local(board), alone, UserError("no weights here"), 1) == {
        "refused": "no weights here", "exit": 1,
    }  # fmt: skip
    board.refuse("rank 0 on h: connection closed", 1)
    board.post(News(Progress("training")))  # rank 0 talks on while it waits
    assert not waiting.over(stop=False), "where all ranks refuse, the group ends by itself"
    now[0] += 60
    board.post(News(Progress("training")))
    assert waiting.over(stop=False)
    assert waiting.refused
    assert not waiting.over(stop=False), "once"
    verdict = board.end()[1]
    assert verdict.refusal == f"rank 1 on {socket.gethostname()}: no weights here"
    assert verdict.exit_code == 1


@pytest.mark.parametrize(
    ("error", "code"), [(WeightsError("torn"), 1), (StorageGoneError("away"), 4), (FencedError("taken"), 3)]
)
def test_what_a_restart_cannot_cure_is_on_the_board_with_its_exit_code(here, monkeypatch, error, code):
    board = Board()
    stages = []
    context = SimpleNamespace(rank=1, close=lambda: None, progress=stages.append)
    monkeypatch.setattr(launch.worker, "RayContext", lambda *_: context)
    monkeypatch.setattr(launch.worker, "granted_cpus", lambda: 1)

    def train(config, run):
        raise error

    monkeypatch.setattr(launch.worker, "train", train)
    monkeypatch.setattr(launch.worker.torch, "set_num_threads", lambda count: None)
    config = SimpleNamespace(train=SimpleNamespace(threads=1))
    assignment = launch.worker.Assignment(config, "/nowhere", "0", 1, Local(board), {})
    assert train_worker({"assignment": assignment}) == {"refused": str(error), "exit": code}
    assert board.end()[1] == Admission(refusal=f"rank 1 on {socket.gethostname()}: {error}", exit_code=code)
    assert stages == ["refused"]


def attempt_over(monkeypatch, board, fit):
    """An attempt whose Ray Train is `fit`."""
    trainer = SimpleNamespace(fit=fit)
    monkeypatch.setattr(launch.run, "open_board", lambda failures: Local(board))
    monkeypatch.setattr(launch.run, "make_trainer", lambda *_, **__: trainer)
    attempt = _Attempt.__new__(_Attempt)
    attempt._config = SimpleNamespace(cluster=ClusterConfig())
    attempt._part, attempt._facts, attempt._question, attempt._folder = 0, {}, None, None
    attempt._life, attempt._lease = SimpleNamespace(record=None), SimpleNamespace(number=1, lost=None)
    attempt._stops, attempt._metrics = Stops(), SimpleNamespace(heard=lambda step: None)
    return attempt


def test_a_controller_that_dies_ends_the_run_as_failed_and_is_not_blamed_on_an_older_failure(here, monkeypatch):
    board = Board()
    board.failed({0: "something that was mended hours ago"})

    def fit():
        raise ActorDiedError

    returned, (cause, everything) = attempt_over(monkeypatch, board, fit)._train(Resources(1, 1.0, 0))
    assert returned == {}
    assert cause.startswith("Ray Train's controller, which runs on the driver's node")
    assert cause.endswith("(ActorDiedError)")
    assert "The actor died unexpectedly" in everything


def test_the_driver_says_what_one_rank_refused_with(here, monkeypatch):
    board, ended = Board(), threading.Event()
    monkeypatch.setattr(launch.waiting, "_REFUSED_S", 0.1)
    monkeypatch.setattr(launch.run, "end_controller", ended.set)

    def fit():
        board.refuse("rank 1 on h: no weights here", 1)
        assert ended.wait(30), "nobody ended the group"
        raise ActorDiedError

    attempt = attempt_over(monkeypatch, board, fit)
    attempt._stops.reason = "SIGTERM"  # a stop that comes meanwhile hides nothing
    returned, _ = attempt._train(Resources(2, 1.0, 0))
    assert returned == {"refused": "rank 1 on h: no weights here", "exit": 1}


# -- a notice that a node goes away ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline_ms", "until"), [(0, "a little longer"), (3_600_000, "until 01:00:00 UTC")])
def test_a_notice_that_a_node_goes_is_a_reason_to_stop_that_is_no_persons(monkeypatch, deadline_ms, until):
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=None))
    monkeypatch.setattr(launch.worker, "get_train_context", lambda: context)
    run = RayContext.__new__(RayContext)
    run._board = SimpleNamespace(stop_reason="")
    assert run.stop_reason() == ""
    context.preemption_context.preemption_info = SimpleNamespace(deadline_ms=deadline_ms, preempted_ranks=[1, 3])
    assert run.stop_reason() == f"{PREEMPTED}: the node of rank 1, 3 is there only {until}"
    run._board.stop_reason = "SIGTERM"
    assert run.stop_reason() == "SIGTERM", "a person's wish comes first"
    run._board = None
    assert run.stop_reason() == "", "rank 0 tells the others"


# -- states of a run ---------------------------------------------------------------------------------------------------


def test_states_are_kept_in_the_record_as_long_as_the_run_is_ours(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    with Lease(folder, 600.0) as lease:
        life = Lifecycle(folder, open_record(folder, {}, "n").next_attempt(), lease)
        life.enter("starting")
        life.note("running", "step 0, 2 workers")
        life.enter("finished", finished=True, summary={"step": 3})
        stored = json.loads(folder.get(KEY))
        assert (stored["state"], stored["finished"], stored["summary"]) == ("finished", True, {"step": 3})
        assert [entry["state"] for entry in stored["history"]] == ["starting", "running", "finished"]
        assert stored["history"][1]["reason"] == "step 0, 2 workers"
        assert life.story().startswith("starting ")

        log = RunLog(folder)
        number = log.last().number + 1
        log.create(number, "owner", number, {"host": "other", "pid": 1, "since": "now"})
        with pytest.raises(FencedError, match="lease has passed on"):
            life.enter("failed")
        life.note("stopped")  # is not written down, and ends nothing
    assert json.loads(folder.get(KEY))["state"] == "finished"


def test_the_history_of_a_run_does_not_grow_without_end():
    record = RunRecord("uid", {})
    for _ in range(1000):
        record = record.entered("resumed")
    assert len(record.history) == 200
