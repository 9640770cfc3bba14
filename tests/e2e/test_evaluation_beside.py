"""Evaluations beside the training on real Ray: one worker trains, one free CPU measures, one death in between."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.support import TINY, job_environment, write_home

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
WORDS = ("cluster.workers=1", "train.epochs=3", "eval.every_epochs=1", "eval.bank=40", "train.log_every=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def start(home, name, *words):
    settings = [word for word in TINY if not word.startswith("track.follow")]
    return subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", *settings, *WORDS, f"run.name={name}", *words], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=job_environment(home),
    )  # fmt: skip


def kill_the_first_evaluation(driver):
    """SIGKILL for the process that measures, as soon as there is one."""
    deadline = time.monotonic() + 300
    while True:
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if "evaluate_apart" in " ".join(process.cmdline()):
                    process.kill()
                    return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)


def scores(home, name):
    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    (run,) = [
        r for e in client.search_experiments() for r in client.search_runs([e.experiment_id]) if r.info.run_name == name
    ]
    names = [metric for metric in run.data.metrics if metric.startswith("eval/")]
    history = {m: {point.step: point.value for point in client.get_metric_history(run.info.run_id, m)} for m in names}
    return history, run


def records(home, name):
    """What rank 0 wrote, in its order."""
    (stream,) = (home / "runs" / name / "track" / "journal").glob("*-rank0-*")
    lines = [line for path in sorted(stream.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record["kind"] == "metrics"]


# In a process of its own: Ray leaves threads and warnings behind.
CLAIMS = """
import time
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from orchestrator.launch.cluster import Resources
from orchestrator.launch.evaluations import RayRunner

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def wait_for(wanted):
    until = time.monotonic() + 120
    while (found := (runner.claimed(), runner.room())) != wanted:
        assert time.monotonic() < until, (found, wanted)
        time.sleep(0.2)


@ray.remote(num_cpus=1, max_retries=0)
def evaluation():
    time.sleep(600)


runner = RayRunner(None, Resources(1, 1.0, 0))
group = placement_group([{"CPU": 1}])
ray.get(group.ready())
wait_for((False, True))
task = evaluation.remote()
wait_for((False, False))
more = placement_group([{"CPU": 1}])  # the group grows back, and waits for what the evaluation holds
wait_for((True, False))
runner.stop(task)
wait_for((False, False))
remove_placement_group(more)
wait_for((False, True))
print("done")
"""


def test_what_the_training_waits_for_is_seen_and_given_back():
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS], capture_output=True, text=True, timeout=500, check=False, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "done"


def place(found, step, name):
    return next(i for i, record in enumerate(found) if record["step"] == step and name in record["values"])


def test_metrics_of_evaluations_beside_land_at_their_steps_and_no_step_waits(home):
    with start(home, "beside", "eval.where=beside") as driver:
        kill_the_first_evaluation(driver)
        text, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, text
    assert "evaluation beside: on {'CPU': 1.0} beside 1 workers" in text
    assert re.search(
        r"evaluations beside\s+3 of 3 done in \d+ s of their own \(no part of the time of all ranks\)", text
    )
    assert "warning: the evaluation" not in text

    with start(home, "inside", "eval.where=inside") as driver:
        shown, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, shown
    found, recorded = scores(home, "beside")
    expected, _ = scores(home, "inside")
    assert found == expected
    steps = sorted(found["eval/knn_top1"])
    assert len(steps) == 4
    assert recorded.data.tags["evaluation"].startswith("beside")
    assert recorded.data.params["eval.where"] == "beside"
    # Inside, step 1 waits for the evaluation of step 0; beside it was long done when that came back.
    order = records(home, "beside")
    assert place(order, 1, "train/loss") < place(order, 0, "eval/knn_top1")
    order = records(home, "inside")
    assert place(order, 1, "train/loss") > place(order, 0, "eval/knn_top1")
    kept = home / "runs" / "beside" / "evaluations"
    assert [json.loads(path.read_text())["state"] for path in sorted(kept.glob("*.json"))] == ["done"] * 3
