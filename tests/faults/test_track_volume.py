"""A million metric points: memory stays bounded, the journal rotates, every point is shipped once."""

import psutil
import pytest

from orchestrator.track.config import TrackConfig
from orchestrator.track.events import Metrics
from orchestrator.track.follower import Shipper
from orchestrator.track.journal import segments, streams
from orchestrator.track.recorder import Recorder
from orchestrator.track.server import RunIdentity
from orchestrator.track.steps import StepSet

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
STEPS, NAMES = 100_000, [f"train/part_{number}" for number in range(10)]


class CountingServer:
    """Takes what a server would take, remembers only which (metric, step) it was given."""

    identity = RunIdentity("uid")
    run_id = "run"

    def __init__(self):
        self.steps = {name: StepSet() for name in NAMES}
        self.twice = 0
        self.largest = 0

    def connect(self):
        return self.run_id

    def ship(self, batch):
        self.largest = max(self.largest, sum(len(record.event.values) for record in batch))
        for record in batch:
            assert isinstance(record.event, Metrics)
            for name in record.event.values:
                self.twice += not self.steps[name].add(record.event.step)


def resident_mb():
    return psutil.Process().memory_info().rss / 1e6


def test_a_million_points(tmp_path):
    config = TrackConfig(uri="http://127.0.0.1:9", segment_mb=2.0, poll_s=0.05, backoff_max_s=0.2, lag_every_s=1e6)
    recorder = Recorder(config, "uid", tmp_path)  # its follower finds no server all the while
    recorder.metrics(0, dict.fromkeys(NAMES, 0.0))
    before = resident_mb()
    for step in range(1, STEPS):
        recorder.metrics(step, dict.fromkeys(NAMES, step * 0.5))
    recorded = resident_mb()
    backlog = recorder.close(0.2)
    assert backlog.waiting == STEPS

    (stream,) = streams(tmp_path)
    sizes = [path.stat().st_size for path in segments(stream)]
    assert len(sizes) > 5
    assert max(sizes) < 2.1 * (1 << 20)

    server = CountingServer()
    shipper = Shipper(tmp_path, server, config)
    while shipper.step():
        pass
    shipped = resident_mb()
    assert server.twice == 0
    assert all(len(steps) == STEPS for steps in server.steps.values())
    assert max(server.largest, shipper.peak_points) <= config.queue_bound
    assert shipper.waiting() == 0
    # MLflow itself is imported by the follower (some 200 MB); the points would be 1,000 MB as objects.
    assert recorded - before < 400
    assert shipped - recorded < 100
