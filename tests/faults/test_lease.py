"""Drivers as processes: started together, stopped and woken, killed; on a disk and on a real object store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.launch.lease import HeldError, Lease
from tests.faults.test_data_s3 import KEYS, Weed

HOLDER = str(Path(__file__).with_name("lease_holder.py"))
LEASE_S = 6.0


class Holder:
    """`lease_holder.py` as a process."""

    def __init__(self, uri, environment):
        self.process = subprocess.Popen(
            [sys.executable, HOLDER, uri, str(LEASE_S)], stdout=subprocess.PIPE, text=True, env=environment
        )
        self.lines = []

    def until(self, start):
        """Reads lines until one begins so."""
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith(start):
                return self.lines[-1]
        raise AssertionError(f"no line {start!r} in {self.lines}")

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    os.environ.update(KEYS)
    server = Weed(tmp_path_factory.mktemp("weed"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.long)])
def place(request, tmp_path, monkeypatch):
    """(URI of a run, how to open it, environment of processes) on a disk or in a bucket."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    if request.param == "disk":
        return str(tmp_path / "run"), StoreConfig(), environment
    server = request.getfixturevalue("weed")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    uri = f"s3://data/{uuid.uuid4().hex}"
    return uri, StoreConfig(endpoint=server.endpoint), {**os.environ, "PYTHONPATH": root}


@pytest.mark.long
def test_an_owner_that_is_stopped_past_its_lease_cannot_commit_when_it_wakes(place):
    uri, store, environment = place
    folder = Folder(uri, store)
    first = Holder(uri, environment)
    second = None
    try:
        first.until("committed 3")
        with pytest.raises(HeldError, match="is held by a driver on host"):
            Lease(folder, LEASE_S)
        first.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 120
        while second is None:
            assert time.monotonic() < deadline
            time.sleep(1)
            newcomer = Holder(uri, environment)
            line = newcomer.process.stdout.readline()
            if line.startswith("taken"):
                second = newcomer
                assert "has not renewed its lease for" in line
            else:
                assert "is held by a driver on host" in line
                assert newcomer.process.wait(60) == 3
                newcomer.end()
        second.until("committed")
        first.process.send_signal(signal.SIGCONT)
        told = first.until("FencedError")
        assert "this driver's lease has passed on (to host" in told
        assert "nothing more is committed from here" in told
        assert first.process.wait(60) == 3
        second.until("committed")
    finally:
        for holder in filter(None, (first, second)):
            holder.end()
    reader = CheckpointStore(folder, keep=3)
    fences = [json.loads(folder.get(f"checkpoints/step-{s:08d}/COMMITTED.json"))["fence"] for s in reader.steps()]
    assert fences == sorted(fences)
    entries = [json.loads(folder.get(f"log/{n}")) for n in folder.names("log") if n.endswith(".json")]
    terms = [entry["term"] for entry in entries]
    assert terms == sorted(terms)  # nothing of the first owner after the second came
    assert len(set(terms)) == 2
    assert reader.load_newest().state == {"by": max(terms)}


def test_after_a_kill_on_this_host_the_next_driver_need_not_wait(place):
    uri, _, environment = place
    first = Holder(uri, environment)
    first.until("committed 1")
    first.end()
    second = Holder(uri, environment)
    try:
        assert "is gone; this one takes the run over" in second.until("taken")
        second.until("committed")
    finally:
        second.end()


@pytest.mark.parametrize("round_", range(10))
def test_of_drivers_that_start_together_exactly_one_gets_the_run(place, round_):
    uri, store, _ = place
    start, won, held = threading.Barrier(4), [], []

    def drive():
        start.wait()
        try:
            won.append(Lease(Folder(uri, store), 600.0))
        except HeldError as error:
            held.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lease in won:
        lease.release()
    assert (len(won), len(held)) == (1, 3)


def test_create_if_absent_has_one_winner(place):
    """What everything here rests on."""
    uri, store, _ = place
    for number in range(10):
        start, won = threading.Barrier(8), []

        def create(name, start=start, won=won, number=number):
            folder = Folder(uri, store)
            start.wait()
            if folder.put(f"log/{number:08d}.json", name.encode(), only_if_absent=True):
                won.append(name)

        threads = [threading.Thread(target=create, args=(f"writer-{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert Folder(uri, store).get(f"log/{number:08d}.json").decode() == won[0]
