"""A worker of a real Ray Train run is stopped in mid-run: the hang is told, cured and counted, and no loss changes."""

import json
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
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
HANG_S = 10


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def start(home, name):
    words = [
        f"run.name={name}", "cluster.workers=2", "train.epochs=30", "train.log_every=1", "checkpoint.every_steps=1",
        "eval.queries=8", f"train.guard.hang_s={HANG_S}", "cluster.max_failures=1",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", *TINY, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=job_environment(home), text=True,
    )  # fmt: skip


def wait_for(ready, driver, seconds=300):
    until = time.monotonic() + seconds
    while not (found := ready()):
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def workers(driver):
    found = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


def finished(run):
    return losses(SimpleNamespace(directory=run))


def test_a_stopped_worker_is_told_of_and_the_group_starts_again(home):
    with start(home, "whole") as driver:
        text, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, text
    expected = finished(home / "runs" / "whole")

    run = home / "runs" / "stopped"
    with start(home, "stopped") as driver:
        wait_for(lambda: len(list((run / "checkpoints").glob("step-*/COMMITTED.json"))) > 2, driver)
        stopped = workers(driver)[-1].pid
        os.kill(stopped, signal.SIGSTOP)
        text, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, text

    (incident,) = (run / "hangs").iterdir()
    found = {path: json.loads(path.read_text().splitlines()[0]) for path in incident.glob("rank-*")}
    assert sorted(report["rank"] for report in found.values()) == [0, 1]
    (seen,) = [report for report in found.values() if report["seen_by"] >= 0]
    assert f"(pid {stopped}) is stopped" in seen["state"]
    for path in found:
        # Reading another process takes a right that this machine may not give; then the file says so.
        assert "train/loop.py" in path.read_text() or "(no stack: " in path.read_text()
    assert text.count("the group hangs") == 1
    told = text.split("the group hangs")[1]
    assert f"rank {seen['rank']} of 2 is the slowest" in told
    assert re.search(r"train.loop\.py|\(no stack: ", told)
    assert "failure 1 of at most 1" in text
    resumed = re.search(r"resumed from the checkpoint of step (\d+) of", text)
    assert int(resumed.group(1)) > 0
    assert finished(run) == expected  # the helper also compares steps that were done twice
    assert sorted(expected) == list(range(1, max(expected) + 1))
