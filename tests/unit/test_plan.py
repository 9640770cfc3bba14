"""The forecast: arithmetic that can be checked by hand, and a probe of real steps."""

import pytest

from orchestrator.config.load import load
from orchestrator.launch.home import resolve
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.forecast import Job, Probe, forecast
from orchestrator.plan.plan import plan
from orchestrator.plan.report import LABELS, table
from orchestrator.train.loop import train
from tests.support import TINY, LocalRun, tiny_config, write_shards

PROBE = Probe(
    parameters=100, trained=80, teacher_parameters=20, state_bytes=2000, activation_bytes_per_image=50.0,
    checkpoint_bytes=1200, copy_seconds=0.5, flops_per_image=1e9, tokens_per_image=196, images_per_second=10.0,
    device="a machine",
)  # fmt: skip
JOB = Job(
    global_batch=32, micro_batch=0, devices=4, steps=1000, steps_per_epoch=100, samples=3200, data_bytes=10**6,
    cached=False, saves=10, device_images_per_second=10.0,
)  # fmt: skip


def test_the_forecast_by_hand():
    found = forecast(PROBE, JOB)
    assert found.keys() == LABELS.keys()
    assert found["images_per_second"] == 40
    assert found["seconds_per_step"] == pytest.approx(0.8)
    assert found["samples"] == 32_000
    assert found["tokens"] == 32_000 * 196
    assert found["memory_bytes"] == 2000 + 8 * 50
    assert found["data_egress_bytes"] == 10**7
    assert found["checkpoint_total_bytes"] == 12_000
    assert found["allreduce_bytes"] == pytest.approx(2 * 3 / 4 * 80 * 4)
    assert found["hours"] == pytest.approx((800 + 5) / 3600)


def test_one_device_needs_no_network_and_a_cache_reads_once():
    one = Job(**{**vars(JOB), "devices": 1, "cached": True, "micro_batch": 4})
    found = forecast(PROBE, one)
    assert found["allreduce_bytes"] == found["allreduce_bytes_per_s"] == 0
    assert found["data_egress_bytes"] == 10**6
    assert found["memory_bytes"] == 2000 + 4 * 50


def test_the_table_sets_forecast_beside_outcome():
    text = table(forecast(PROBE, JOB), {"images_per_second": 30.0}, "a run")
    row = next(line for line in text.splitlines() if line.startswith("images/s"))
    assert row.split()[-3:] == ["40", "30", "0.75"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def test_plan_probes_real_steps_and_compares_after_the_run(data, tmp_path, capsys):
    places = [f"data.source={data}", f"run.storage={tmp_path}", "run.name=tiny", "eval.queries=8", "plan.probe_steps=2"]
    config = resolve(load(PlanConfig, None, [*TINY, *places]), {"ITPN_HOME": str(tmp_path)})
    assert plan(config, "test") == 0
    before = capsys.readouterr().out
    for label, _ in LABELS.values():
        assert label in before
    assert "outcome" not in before
    assert not (tmp_path / "tiny").exists(), "planning leaves nothing behind"
    done = tiny_config(data, tmp_path)
    train(done, LocalRun(done))
    assert plan(config, "test") == 0
    after = capsys.readouterr().out
    assert "outcome" in after
    steps = next(line for line in after.splitlines() if line.startswith("steps"))
    assert steps.split() == ["steps", "8", "8", "1.00"]
    # The file of so small a state is a tenth names.
    size = next(line for line in after.splitlines() if line.startswith("one checkpoint"))
    assert 0.9 < float(size.split()[-1]) < 1.3
