"""Drivers of one run on one cluster, a worker that is killed, requests that cannot be met: real Ray, real jobs."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.checkpoint.runlog import RunLog
from orchestrator.data.folder import Folder
from tests.e2e.test_job_submit import RAY, free_port
from tests.support import TINY, job_environment, write_home

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@contextlib.contextmanager
def ray_head(home, environment):
    """A Ray head of our own, ended by its process group; gives the environment of jobs on it."""
    token = home / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {**environment, "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    temp, port = (
        Path("/tmp") / f"ray-one-{os.getpid()}",
        free_port(),
    )  # short: Unix sockets below it have 107 characters
    words = [
        "start", "--head", "--block", "--num-cpus=4", f"--port={port}", "--node-ip-address=127.0.0.1",
        f"--temp-dir={temp}", "--include-dashboard=false",
    ]  # fmt: skip
    log = (home / "head.log").open("w")
    with log, subprocess.Popen([RAY, *words], env=environment, stdout=log, stderr=log, start_new_session=True) as head:
        address = f"127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while subprocess.run(
            [RAY, "health-check", "--address", address], env=environment, capture_output=True, check=False
        ).returncode:
            assert head.poll() is None, (home / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        try:
            yield {**environment, "RAY_ADDRESS": address}
        finally:
            os.killpg(head.pid, signal.SIGKILL)
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of jobs on a Ray head of our own."""
    home = write_home(tmp_path_factory.mktemp("root"))
    with ray_head(home, job_environment(home)) as environment:
        yield environment


def command(*words):
    return [sys.executable, "jobs/pretrain.py", *TINY, "cluster.workers=1", "eval.queries=8", *words]


def start(environment, *words):
    return subprocess.Popen(
        command(*words), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def folder_of(environment, name):
    return Folder(str(Path(environment["ITPN_HOME"], "runs", name)))


def wait_for(what, done, seconds=180.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def entries(folder):
    log = RunLog(folder)
    last = log.last()
    return [log.entry(number) for number in range(1, last.number + 1)] if last else []


def commits(folder, term=0):
    return [e for e in entries(folder) if e.kind == "commit" and (not term or e.term == term)]


def test_of_two_simultaneous_submits_one_trains_and_the_other_exits_3(cluster):
    both = [start(cluster, "run.name=both") for _ in range(2)]
    texts = [process.communicate(timeout=400)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 3], texts
    held = texts[codes.index(3)]
    (line,) = [line for line in held.splitlines() if line.startswith("error")]
    assert re.search(r"run both is held by a driver on host \S+, pid \d+, since .* UTC; its lease ends at", line)
    record = json.loads(folder_of(cluster, "both").get("run.json"))
    assert (record["state"], record["attempts"]) == ("finished", 1)
    assert [entry["state"] for entry in record["history"]] == ["starting", "running", "finished"]


ENDLESS = ("train.epochs=100000", "train.log_every=1", "checkpoint.every_steps=5", "checkpoint.every_epochs=0")


def test_an_owner_stopped_past_its_lease_ends_without_a_commit_when_it_wakes(cluster):
    folder = folder_of(cluster, "slept")
    words = ("run.name=slept", "run.lease_s=5", *ENDLESS)
    first = start(cluster, *words)
    try:
        wait_for("commits of the first driver", lambda: commits(folder))
        first.send_signal(signal.SIGSTOP)
        wait_for("a lease that has run out", lambda: time.time() - folder.modified(_beat(folder)) > 8)
        second = start(cluster, *words)
        wait_for("commits of the second driver", lambda: len({e.term for e in commits(folder)}) == 2)
        first.send_signal(signal.SIGCONT)
        text = first.communicate(timeout=120)[0]
        assert first.returncode == 3, text
        assert "this driver's lease has passed on (to host" in text
        assert "Traceback" not in text
        before = len(commits(folder))
        wait_for("more commits of the second driver", lambda: len(commits(folder)) > before)
        second.send_signal(signal.SIGINT)
        text = second.communicate(timeout=120)[0]
        assert second.returncode == 0, text
        assert "has not renewed its lease for" in text
        assert "resumed from the checkpoint of step" in text
    finally:
        for process in (first, second):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    terms = [entry.term for entry in entries(folder)]
    assert terms == sorted(terms), "an entry of the first driver after one of the second"
    record = json.loads(folder.get("run.json"))
    assert (record["state"], record["attempts"]) == ("stopped", 2)


def _beat(folder):
    return f"log/beat-{max(e.term for e in entries(folder)):08d}"


def training_workers():
    """Process numbers of all training workers on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ray::RayTrainWorker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def test_a_killed_worker_is_named_and_the_run_goes_on_from_the_last_checkpoint(cluster):
    folder = folder_of(cluster, "killed")
    before = set(training_workers())
    words = ("run.name=killed", "train.epochs=24", "train.log_every=1", "checkpoint.every_steps=2")
    driver = start(cluster, *words, "cluster.workers=2")
    wait_for("two commits", lambda: len(commits(folder)) > 1)
    victims = set(training_workers()) - before
    os.kill(max(victims), signal.SIGKILL)
    text = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, text
    assert re.search(r"warning: rank [01]: its process ended without a word", text), text
    assert "the worker group starts again from the last checkpoint (failure 1 of at most 3)" in text
    assert "resumed from the checkpoint of step" in text
    record = json.loads(folder.get("run.json"))
    assert [entry["state"] for entry in record["history"]] == ["starting", "running", "resumed", "finished"]


def test_a_request_that_can_never_be_met_ends_in_seconds(cluster):
    done = subprocess.run(
        command("run.name=large", "cluster.workers=9", "train.global_batch=18"), cwd=ROOT, env=cluster,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cluster.workers=9" in done.stderr
    assert "room for 4 such workers" in done.stderr
    assert json.loads(folder_of(cluster, "large").get("run.json"))["state"] == "failed"


def test_fewer_workers_than_asked_are_enough_within_the_elastic_range(cluster):
    done = subprocess.run(
        command("run.name=elastic", "cluster.workers=9", "cluster.workers_min=1", "train.global_batch=18"), cwd=ROOT,
        env=cluster, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 to 9 workers" in done.stdout
    record = json.loads(folder_of(cluster, "elastic").get("run.json"))
    assert record["history"][1]["reason"] == "step 0, 4 workers"
