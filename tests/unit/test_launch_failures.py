"""What a launch does about trouble, without a cluster: failures, states of a run, nodes that differ."""

import json
import re
import socket
import time
from dataclasses import replace

import pytest

from orchestrator.checkpoint.runlog import FencedError, RunLog
from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.launch.board import Admission, Board, News, Progress
from orchestrator.launch.failure import Complaint, backoff_seconds, first_failure, root_cause
from orchestrator.launch.lease import Lease
from orchestrator.launch.nodes import Question, answer, compare, versions
from orchestrator.launch.record import KEY, Lifecycle, RunRecord, open_record
from orchestrator.track.config import TrackConfig, why_away
from tests.support import tiny_config, write_shards


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
    board.failed({0: "x"})
    assert board.read().notes == []
    assert board.admit() == Admission(refusal="the data are away", exit_code=4)


def test_the_board_knows_whether_a_group_runs_and_for_how_long_it_was_silent():
    board = Board(max_failures=3)
    assert board.group()[0] is False
    board.admit()
    running, silent = board.group()
    assert running
    time.sleep(0.05)
    assert board.group()[1] >= silent + 0.05
    assert board.admit().open_s >= 0.05, "counted from the board's own birth, also for later groups"
    board.post(News(None))
    assert board.group()[1] < 0.05
    board.failed({0: "x"})
    board.post(News(None))  # last words
    assert board.group()[0] is False


def test_news_are_told_once_and_a_stop_request_reaches_rank_0():
    board = Board()
    assert board.post(News(None, ["a"], [("running", "")])) == ""
    board.stop("SIGTERM")
    assert board.post(News(Progress("training", step=1), ["b"])) == "SIGTERM"
    assert board.read() == News(Progress("training", step=1), ["a", "b"], [("running", "")])
    assert board.read() == News(Progress("training", step=1))


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


# -- nodes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    config = tiny_config(write_shards(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("storage"))
    uri = f"{config.run.storage}/tiny"
    Folder(uri).put(KEY, b"{}")
    return Question(config, uri, KEY, Manifest.load(config.data.source).fingerprint, versions(), "driver")


def test_a_node_that_sees_what_the_driver_sees_is_fit(question):
    found = answer(question)
    assert found.trouble == ""
    assert compare(found, question, "10.0.0.1") == ""
    assert set(found.versions) == {"python", "ray", "torch", "source code"}


@pytest.mark.parametrize("name", ["python", "ray", "torch", "source code"])
def test_a_node_with_another_version_is_named(question, name):
    other = replace(answer(question), versions={**versions(), name: "0.1"})
    said = compare(other, question, "10.0.0.1")
    assert re.match(rf"node 10\.0\.0\.1 \(host .*\) has {name} 0\.1, the driver has .*--working-dir", said)


def test_a_node_without_the_runs_folder_is_named_and_nothing_is_made_there(question, tmp_path):
    elsewhere = str(tmp_path / "runs" / "tiny")
    found = answer(replace(question, folder_uri=elsewhere))
    assert "does not see run.storage=" in found.trouble
    assert "s3://bucket/runs or a shared mount" in found.trouble
    assert not (tmp_path / "runs").exists()
    assert not found.away
    assert re.match(r"node 10\.0\.0\.1 .*does not see run\.storage", compare(found, question, "10.0.0.1"))


def test_a_node_that_reads_no_or_other_data_is_named(question, tmp_path):
    nowhere = replace(question.config, data=replace(question.config.data, source=str(tmp_path)))
    assert "cannot read data.source=" in answer(replace(question, config=nowhere)).trouble
    assert "sees other data at data.source=" in answer(replace(question, manifest="0" * 64)).trouble


def test_a_node_from_which_storage_only_swallows_packets_says_so_in_time(question, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = replace(question.config.data.store, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        config = replace(
            question.config, data=replace(question.config.data, store=store),
            run=replace(question.config.run, storage="s3://bucket/runs"),
        )  # fmt: skip
        began = time.monotonic()
        found = answer(replace(question, config=config, folder_uri="s3://bucket/runs/tiny", reach_s=2.0))
        assert time.monotonic() - began < 10
    assert found.away
    assert found.trouble == (
        "cannot reach run storage (run.storage=s3://bucket/runs), which the driver can: no answer within 2 s"
    )
    assert Question.reach_s <= 20, "the default is a matter of seconds too"


# -- tracking ----------------------------------------------------------------------------------------------------------


def test_only_a_server_that_cannot_be_reached_is_worth_a_warning():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        away = why_away(TrackConfig(uri=uri))
        assert "127.0.0.1" in away
        assert "secret" not in away
        server.listen()
        assert why_away(TrackConfig(uri=uri)) == ""
    assert why_away(TrackConfig(uri=uri, follow=False)) == ""
    assert why_away(TrackConfig(uri="sqlite:////tmp/x.db")) == ""
