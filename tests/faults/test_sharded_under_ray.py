"""Workers of a real Ray Train run share the model (FSDP2): killed, stopped and resumed by other groups, same losses."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.support import TINY, job_environment, losses, write_home

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SHARED = ("train.precision=fp64", "train.epochs=12", "train.log_every=1", "checkpoint.every_steps=1", "eval.queries=8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def start(home, name, workers, *words):
    command = [sys.executable, "jobs/pretrain.py", *TINY, *SHARED, f"run.name={name}", f"cluster.workers={workers}"]
    return subprocess.Popen(
        [*command, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=job_environment(home),
        text=True,
    )  # fmt: skip


def finish(home, name, workers, *words):
    with start(home, name, workers, *words) as driver:
        text, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, text
    return text


def commits(run):
    return sorted(int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/step-*/COMMITTED.json"))


def wait_for_commit(run, step, driver):
    until = time.monotonic() + 300
    while max(commits(run), default=0) < step:
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def curve(home, name):
    found = losses(SimpleNamespace(directory=home / "runs" / name))  # also compares steps that were done twice
    assert sorted(found) == list(range(1, max(found) + 1))
    return list(found.values())


def test_a_model_in_parts_survives_a_kill_a_stop_and_groups_of_other_kinds(home):
    finish(home, "whole", 1)
    expected = curve(home, "whole")

    run = home / "runs" / "parts"
    with start(home, "parts", 2, "train.parallel=shard", "cluster.max_failures=1") as driver:
        wait_for_commit(run, 4, driver)
        (newest,) = {path.parent for path in run.glob(f"checkpoints/step-{commits(run)[-1]:08d}/COMMITTED.json")}
        assert len(list(newest.glob("*-tensors-0000?-of-00002.safetensors"))) == 2, "each worker writes its part"
        children = psutil.Process(driver.pid).children(recursive=True)
        victim = [process for process in children if "RayTrainWorker" in " ".join(process.cmdline())][-1]
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(1)
        wait_for_commit(run, commits(run)[-1] + 5, driver)
        driver.send_signal(signal.SIGINT)
        text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    assert "failure 1 of at most 1" in text
    assert re.search(r"resumed from the checkpoint of step \d+ of", text)
    stopped = int(re.search(r"stopped \(SIGINT\) at step (\d+)", text)[1])
    assert stopped < len(expected)

    # The parts of two workers are read by one, which holds everything; the last steps are those of copies of parts.
    with start(home, "parts", 1) as driver:
        wait_for_commit(run, stopped + 4, driver)
        driver.send_signal(signal.SIGINT)
        text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    assert f"resumed from the checkpoint of step {stopped}" in text
    finish(home, "parts", 2, "train.parallel=hybrid", "train.shard_ranks=1")
    assert curve(home, "parts") == pytest.approx(expected, rel=1e-8)
    assert (run / "final" / "backbone.safetensors").stat().st_size > 0
