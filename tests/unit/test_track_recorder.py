import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.events import Metrics, Params
from orchestrator.track.journal import records
from orchestrator.track.recorder import Recorder


@pytest.fixture
def config(tmp_path):
    return resolve(TrackConfig(poll_s=0.02), tmp_path)


def test_worker_then_driver_end_in_one_run(config, tmp_path):
    from mlflow import MlflowClient

    run = tmp_path / "run"
    worker = Recorder(config, "uid-1", run, attempt=1, name="first", role="rank0")
    worker.state("running")
    worker.params({"model": {"depths": (1, 1, 6)}, "store": {"secret_key": "hunter2!"}})
    for step in range(5):
        worker.metrics(step, {"train/loss": 1.0 / (step + 1), "train/odd": math.nan})
    (run / "note.txt").write_text("password: hunter2!\n")
    worker.artifact(run / "note.txt", "notes")
    backlog = worker.close(60)
    assert backlog.empty, str(backlog)

    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name("itpn").experiment_id
    client.create_run(experiment, start_time=1, tags={"run_uid": "uid-1"})  # as left by a create call that timed out
    driver = Recorder(config, "uid-1", run, attempt=1, role="driver")
    driver.metrics(4, {"train/loss": 99.0, "eval/knn_top1": 0.5})  # the loss of step 4 is there already
    driver.dataset("photos/train", "abc", "/data/photos", "training", {"samples": 10})
    driver.state("finished", "all steps done")
    assert driver.close(60).empty

    experiments = [found.experiment_id for found in client.search_experiments()]
    (found,) = client.search_runs(experiments, "tags.run_uid = 'uid-1'")
    assert found.info.run_id == backlog.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params["store.secret_key"] == "[redacted]"
    assert found.data.params["model.depths"] == "(1, 1, 6)"
    history = client.get_metric_history(backlog.run_id, "train/loss")
    assert [point.step for point in history] == [0, 1, 2, 3, 4]
    assert history[-1].value == pytest.approx(0.2)
    assert found.data.metrics["eval/knn_top1"] == 0.5
    assert found.inputs.dataset_inputs[0].dataset.name == "photos/train"
    path = client.download_artifacts(backlog.run_id, "notes/note.txt", str(tmp_path))
    assert Path(path).read_text() == "password: [redacted]\n"
    kept = [held for held in tmp_path.rglob("*") if held.is_file() and held != run / "note.txt"]
    assert [held for held in kept if b"hunter2!" in held.read_bytes()] == []  # journal, database, artifacts
    assert json.loads((run / "track" / "run.json").read_text())["run_uid"] == "uid-1"


def test_nothing_but_a_write_happens_on_the_callers_thread(tmp_path, monkeypatch):
    """No socket and no fsync: both are watched while every method is called with a dead server behind it."""
    import socket

    touched = []
    caller = threading.get_ident()

    def watch(name, real):
        def call(*args, **kwargs):
            if threading.get_ident() == caller:
                touched.append(name)
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "fdatasync"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, watch(name, getattr(owner, name)))
    monkeypatch.setattr(socket.socket, "connect", watch("connect", socket.socket.connect))
    config = TrackConfig(uri="http://127.0.0.1:9", poll_s=0.02)
    recorder = Recorder(config, "uid", tmp_path)
    recorder.params({"a": 1})
    recorder.tags({"b": 2})
    for step in range(200):
        recorder.metrics(step, {"train/loss": 0.5})
    recorder.state("finished")
    recorder.close_segment()
    assert touched == []
    assert sum(isinstance(record.event, Metrics) for record in records(tmp_path)) == 200
    backlog = recorder.close(0.2)
    assert backlog.waiting == 203
    assert "jobs/sync_runs.py" in str(backlog)


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", None])
def test_a_metric_must_be_a_plain_number(tmp_path, config, value):
    recorder = Recorder(config, "uid", tmp_path, follow=False)
    with pytest.raises(ValueError, match="train/loss"):
        recorder.metrics(0, {"train/loss": value})
    recorder.metrics(0, {"train/loss": np.float32(0.25), "count": 3})
    recorder.close(0)
    (record,) = records(tmp_path)
    assert record.event == Metrics(0, {"train/loss": 0.25, "count": 3.0})


@pytest.mark.parametrize("name", ["", "a b/../c?", "/leading", "loss#1", "x" * 251])
def test_a_metric_name_that_mlflow_cannot_hold_is_refused_at_once(tmp_path, config, name):
    recorder = Recorder(config, "uid", tmp_path, follow=False)
    with pytest.raises(ValueError, match="metric name"):
        recorder.metrics(0, {name: 1.0})
    recorder.close(0)


def test_a_full_disk_costs_records_but_raises_nothing(tmp_path, config, monkeypatch):
    recorder = Recorder(config, "uid", tmp_path, follow=False)
    recorder.params({"before": 1})
    real = os.write

    def full(fd, data):
        if b"full" in data:
            real(fd, data[:10])  # half a line reaches the disk
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    recorder.params({"full": 1})
    recorder.params({"after": 1})
    backlog = recorder.close(0)
    assert backlog.lost == 1
    assert "lost" in str(backlog)
    kept = [record.event for record in records(tmp_path)]
    assert Params({"before": "1"}) in kept
    assert Params({"after": "1"}) in kept


def test_nothing_heavy_is_imported_before_the_follower_runs():
    code = (
        "import sys, orchestrator.track.recorder\n"
        "print([name for name in ('mlflow', 'matplotlib', 'requests') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
