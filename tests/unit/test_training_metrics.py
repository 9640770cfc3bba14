"""The engine measures everything that is shown to Prometheus, under the names that the table knows."""

import math

from orchestrator.launch.metrics import GAUGES
from orchestrator.train.loop import train
from tests.support import LocalRun, tiny_config, write_shards


def test_every_shown_number_is_measured_once_per_window(tmp_path):
    config = tiny_config(
        write_shards(tmp_path), tmp_path / "runs", "train.epochs=4", "train.log_every=2", "train.peak_tflops=1.0"
    )
    run = LocalRun(config)
    outcome = train(config, run)
    assert [step for step, _, _ in run.windows] == sorted({step for step, _, _ in run.windows})
    assert sum(steps for _, steps, _ in run.windows) == outcome.step == run.windows[-1][0]
    last = run.windows[-1][2]
    assert GAUGES.keys() | {"train/seconds_per_step"} <= last.keys()
    assert all(math.isfinite(value) for value in last.values())
    assert last["train/seconds_per_step"] > 0
    assert last["checkpoint/write_seconds"] > 0
    assert last["checkpoint/failing"] == last["data/bad_samples"] == 0
