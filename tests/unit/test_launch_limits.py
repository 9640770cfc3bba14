"""What an autoscaler can bring, as manifests write it, and requests to stop."""

import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from itpn_core.errors import UserError
from orchestrator.config.errors import SettingError
from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.launch.check import _check_settings
from orchestrator.launch.cluster import Resources, wanted_cpus
from orchestrator.launch.config import ClusterConfig
from orchestrator.launch.limits import Group, parse
from orchestrator.launch.stops import StopRequest, Stops, terminated_as_interrupted
from tests.support import hearing_hangups


def test_worker_groups_are_read_as_written():
    assert parse("  ") == []
    assert parse("8 x CPU=14,GPU=1; 4x CPU=3.5 , accelerator_type:A100-80G=1") == [
        Group(8, {"CPU": 14.0, "GPU": 1.0}), Group(4, {"CPU": 3.5, "accelerator_type:A100-80G": 1.0}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["GPU=16", "8 x", "8 x CPU", "8 x CPU=", "0 x CPU=1", "-1 x CPU=1", "8 x CPU=-1", "8 x CPU=1,CPU=2",
             "8 x CPU=1;", "8 x CPU=1,,GPU=1", "eight x CPU=1", "8 x CPU=1 GPU=1", "8 x CPU=inf"],
)  # fmt: skip
def test_what_is_written_otherwise_is_refused(text):
    with pytest.raises(UserError, match=r"ITPN_CLUSTER_MAX=.* cannot be read at"):
        parse(text)


def test_a_worker_counts_its_loaders_unless_somebody_has_counted():
    assert [wanted_cpus(ClusterConfig(), loaders) for loaders in (0, 10)] == [1, 11]
    assert wanted_cpus(ClusterConfig(cpus_per_worker=0.5), 10) == 0.5


def test_the_gpu_type_is_a_resource_of_a_worker():
    asked = Resources(2, 12.0, 1, accelerator="H100")
    assert asked.bundle == {"CPU": 12.0, "GPU": 1, "accelerator_type:H100": 0.001}
    assert str(asked) == "12 CPU and 1 H100 GPU"
    assert Resources(2, 1.0, 0).bundle == {"CPU": 1.0}


def test_a_signal_interrupts_only_what_has_nothing_to_save(capfd):
    before = signal.getsignal(signal.SIGTERM)
    told = []
    with Stops() as stops:
        with pytest.raises(StopRequest, match="SIGTERM"), stops.interrupting():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with Stops() as stops:
        stops.tell = told.append
        with stops.interrupting():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert (stops.reason, told) == ("SIGINT", ["SIGINT"])
        with pytest.raises(StopRequest), stops.interrupting():
            raise AssertionError("a signal came before")
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGINT: saving a checkpoint and stopping" in capfd.readouterr().err


def test_failures_cannot_be_counted_below_none():
    """Ray takes -1 for no limit, and pauses and warnings would go by it."""
    with pytest.raises(SettingError, match=r"cluster\.max_failures=-1: it must be at least 0"):
        _check_settings(load(PretrainConfig, None, ["cluster.max_failures=-1", "data.image_size=224"]))


@hearing_hangups()
def test_a_terminal_that_closes_is_a_request_to_stop_but_never_the_second_one(capfd):
    before, told = signal.getsignal(signal.SIGHUP), []
    with Stops() as stops:
        stops.tell = told.append
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # the shell says it too
        assert told == ["SIGHUP"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) == before
    assert "SIGHUP: saving a checkpoint and stopping" in capfd.readouterr().err


def test_under_nohup_a_terminal_that_closes_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops() as stops, stops.interrupting():
            stops.listen()
            os.kill(os.getpid(), signal.SIGHUP)
        with terminated_as_interrupted():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stops.reason == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@hearing_hangups()
def test_a_sweep_ends_as_by_an_interrupt_when_its_terminal_closes():
    before = signal.getsignal(signal.SIGHUP)
    try:
        with terminated_as_interrupted():
            with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # the shell says it too, while the sweep is brought to its end
    finally:
        signal.signal(signal.SIGHUP, before)


HUNG_UP = """
import os, signal, sys, time
from orchestrator.launch.stops import Stops
with Stops() as stops:
    os.write(int(sys.argv[1]), b"ready")
    while not stops.reason:
        time.sleep(0.01)
    print("to nowhere", flush=True)  # Ray, logging and others print too
    os.write(int(sys.argv[1]), stops.reason.encode())
"""


@hearing_hangups()
def test_words_to_a_terminal_that_is_gone_break_nothing():
    """A process with a terminal of its own, which closes as when a connection drops."""
    master, slave = pty.openpty()
    read, write = os.pipe()
    command = ["setsid", "--ctty", sys.executable, "-c", HUNG_UP, str(write)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, pass_fds=[write])
    os.close(slave)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.close(master)
    assert os.read(read, 6) == b"SIGHUP"
    assert process.wait(60) == 0
    os.close(read)


class _Cache(dict[int, bool]):
    """A logger's cache whose clearing is the moment at which the signal comes: `logging` holds its lock then."""

    def clear(self):
        os.kill(os.getpid(), signal.SIGTERM)
        super().clear()


def test_a_stop_leaves_no_lock_of_logging_taken():
    logger = logging.getLogger("test.stops.locked")
    logger._cache = _Cache()  # what `setLevel` clears while it holds the lock, without `finally`

    def interrupted(stops):
        with stops.interrupting():
            logger.setLevel(logging.INFO)
            logger._cache = {}
            while True:  # the signal comes again, out here
                time.sleep(0.01)

    with Stops() as stops, pytest.raises(StopRequest, match="SIGTERM"):
        interrupted(stops)
    other = threading.Thread(target=lambda: logging.getLogger("test.stops.other"), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive(), "another thread waits for the lock of logging"
