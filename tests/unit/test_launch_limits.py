"""What an autoscaler can bring, as manifests write it, and requests to stop."""

import logging
import os
import signal
import threading
import time

import pytest

from itpn_core.errors import UserError
from orchestrator.launch.cluster import Resources, wanted_cpus
from orchestrator.launch.config import ClusterConfig
from orchestrator.launch.limits import Group, parse
from orchestrator.launch.stops import StopRequest, Stops


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
