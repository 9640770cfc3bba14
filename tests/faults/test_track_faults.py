"""No state of the MLflow server slows, stops or falsifies a run; afterwards it holds every event once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.track.events import Metrics, Params
from orchestrator.track.journal import records, restore_segments, segments, streams
from tests.faults.track_server import MlflowServer, SlowProxy

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    # MLflow's client leaves its connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
PLAIN = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield running
    running.kill()


@pytest.fixture
def own_server(tmp_path):
    mine = MlflowServer(tmp_path / "mlflow")
    yield mine
    mine.kill()


class Trainer:
    """The stand-in trainer as a process."""

    def __init__(self, run, uri, uid, attempt=1, first=0, last=100, pause=0.01, close=90):
        words = [str(word) for word in (run, uri, uid, attempt, first, last, pause, close)]
        command = [sys.executable, str(ROOT / "tests" / "faults" / "track_trainer.py"), *words]
        self.process = subprocess.Popen(
            command, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=run.parent
        )

    def until(self, line):
        for said in self.process.stdout:
            if said.strip() == line:
                return
        raise AssertionError(f"the trainer ended before {line!r}")

    def end(self):
        said = self.process.communicate(timeout=200)[0]
        assert self.process.returncode == 0, said
        return said

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def replay(run, uri):
    command = [sys.executable, str(ROOT / "jobs" / "sync_runs.py"), str(run), "--uri", uri]
    return subprocess.run(command, env=PLAIN, capture_output=True, text=True, timeout=200, cwd=run.parent)


def on_server(uri, uid):
    """The only run with this uid, and its points: {(metric, step): [values]}."""
    client = MlflowClient(uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.run_uid = '{uid}'")
    points = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            points.setdefault((name, point.step), []).append(point.value)
    return run, points


def in_journal(run):
    """First value of each (metric, step) and the params, in the journal's order."""
    points, params = {}, {}
    for record in records(run):
        if isinstance(record.event, Metrics):
            for name, value in record.event.values.items():
                points.setdefault((name, record.event.step), value)
        elif isinstance(record.event, Params):
            params.update(record.event.values)
    return points, params


def assert_every_event_once(run_directory, uri, uid):
    run, held = on_server(uri, uid)
    points, params = in_journal(run_directory)
    assert {key: len(values) for key, values in held.items() if len(values) != 1} == {}
    assert {key: values[0] for key, values in held.items()} == points
    assert run.data.params == params
    return run


def test_up(server, tmp_path):
    said = Trainer(tmp_path / "run", server.uri, "up").end()
    assert "every record is in MLflow" in said
    run = assert_every_event_once(tmp_path / "run", server.uri, "up")
    assert run.info.status == "FINISHED"
    assert len(segments(streams(tmp_path / "run")[0])) > 4  # rotated


def test_slow(server, tmp_path):
    proxy = SlowProxy(server.port, seconds=2.0)
    try:
        said = Trainer(tmp_path / "run", proxy.uri, "slow", last=300, close=120).end()
    finally:
        proxy.close()
    assert "every record is in MLflow" in said
    assert_every_event_once(tmp_path / "run", server.uri, "slow")


def test_down_from_the_start_then_replayed_by_hand(own_server, tmp_path):
    said = Trainer(tmp_path / "run", own_server.uri, "down", close=1).end()
    assert "records are not in MLflow" in said
    assert "jobs/sync_runs.py" in said
    failed = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sync_runs.py"), str(tmp_path / "run"), "--uri", own_server.uri,
         "--patience", "1"], env=PLAIN, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert failed.returncode == 1, failed.stdout + failed.stderr
    own_server.start()
    for _ in range(2):  # the second replay finds nothing to do
        done = replay(tmp_path / "run", own_server.uri)
        assert done.returncode == 0, done.stdout + done.stderr
    run = assert_every_event_once(tmp_path / "run", own_server.uri, "down")
    assert run.info.status == "FINISHED"


def test_killed_in_the_middle_and_restarted(own_server, tmp_path):
    own_server.start()
    trainer = Trainer(tmp_path / "run", own_server.uri, "outage", last=600, pause=0.02, close=120)
    trainer.until("step 200")
    own_server.kill()
    trainer.until("step 350")  # it goes on without a server
    own_server.start()
    assert "every record is in MLflow" in trainer.end()
    assert_every_event_once(tmp_path / "run", own_server.uri, "outage")


def test_database_replaced_by_an_empty_one(own_server, tmp_path):
    """The cursor belongs to a run that is gone: everything is told again to the new one."""
    own_server.start()
    trainer = Trainer(tmp_path / "run", own_server.uri, "wiped", last=500, pause=0.02, close=120)
    trainer.until("step 200")
    own_server.kill()
    for path in own_server.folder.glob("server.db*"):
        path.unlink()
    own_server.start()
    assert "every record is in MLflow" in trainer.end()
    assert_every_event_once(tmp_path / "run", own_server.uri, "wiped")


def test_writer_killed_and_resumed(server, tmp_path):
    trainer = Trainer(tmp_path / "run", server.uri, "killed", last=400)
    trainer.until("step 250")
    trainer.kill()
    # Resumed from a checkpoint at step 200: steps 200 to 250 are done twice, with other values.
    Trainer(tmp_path / "run", server.uri, "killed", attempt=2, first=200, last=400).end()
    run = assert_every_event_once(tmp_path / "run", server.uri, "killed")
    assert run.data.tags["attempt"] == "2"
    assert run.info.status == "FINISHED"
    _, held = on_server(server.uri, "killed")
    assert held["train/loss", 210][0] == pytest.approx(1 + 1 / 211)  # the first attempt's value stays
    assert held["train/loss", 300][0] == pytest.approx(2 + 1 / 301)


@pytest.mark.parametrize("cursor", ["kept", "lost"])
def test_replay_over_a_full_server_changes_nothing(server, tmp_path, cursor):
    uid = f"replay-{cursor}"
    Trainer(tmp_path / "run", server.uri, uid).end()
    before = on_server(server.uri, uid)[1]
    if cursor == "lost":
        for path in (tmp_path / "run").rglob("cursor-*.json"):
            path.unlink()
    assert replay(tmp_path / "run", server.uri).returncode == 0
    assert on_server(server.uri, uid)[1] == before


def test_host_destroyed_with_its_disk(server, tmp_path):
    first, second = tmp_path / "host_a" / "run", tmp_path / "host_b" / "run"
    for place in (first, second):
        place.mkdir(parents=True)
    trainer = Trainer(first, server.uri, "host", last=400)
    trainer.until("step 139")
    committed = [(path.parent.name, path) for path in segments(streams(first)[0])[:-1]]
    restore_segments(tmp_path / "storage", committed)  # as run storage holds them with the checkpoint
    trainer.until("step 250")
    trainer.kill()
    shutil.rmtree(first.parent)
    kept = [(path.parent.name, path) for stream in streams(tmp_path / "storage") for path in segments(stream)]
    restore_segments(second, kept)
    Trainer(second, server.uri, "host", attempt=2, first=120, last=400).end()
    run, held = on_server(server.uri, "host")
    points, _ = in_journal(second)
    assert {key: len(values) for key, values in held.items() if len(values) != 1} == {}
    assert {key for key in points if key[0].startswith("train/")} <= held.keys()
    assert {step for name, step in held if name == "train/loss"} == set(range(400))
    assert run.info.status == "FINISHED"


def test_killed_while_a_new_database_is_set_up(tmp_path):
    """SIGKILL amid MLflow's first migrations leaves no half-made database for a later run to trip over."""
    database = tmp_path / "runs" / "mlflow.db"
    database.parent.mkdir()
    uri = f"sqlite:///{database}"
    run = tmp_path / "runs" / "first"
    first = Trainer(run, uri, "uid-of-a-new-database", last=300, pause=0.1)
    deadline = time.monotonic() + 60
    while not any(left.stat().st_size > 40_000 for left in database.parent.glob("mlflow.db.new-*[!l]")):
        assert time.monotonic() < deadline
        assert not database.exists()
        time.sleep(0.001)
    first.kill()
    assert not database.exists()
    said = Trainer(run, uri, "uid-of-a-new-database", attempt=2, last=300).end()
    assert "every record is in MLflow" in said
    assert not list(database.parent.glob("mlflow.db.new-*"))
    assert_every_event_once(run, uri, "uid-of-a-new-database")
