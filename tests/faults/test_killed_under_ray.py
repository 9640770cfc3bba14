"""SIGKILL of workers at three steps and of the driver, under real Ray: the losses are those of the run left alone."""

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

from orchestrator.train.ledger import CLASSES, KEY, Trace
from tests.support import TINY, job_environment, losses, write_home

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
WORDS = (
    "cluster.workers=2", "cluster.max_failures=3", "train.epochs=12", "train.log_every=1", "checkpoint.every_steps=1",
    "eval.queries=8",
)  # fmt: skip
MARGIN = 4
"""Commits between two kills: each group gets somewhere before it is killed, at another step than the one before."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def start(home, name, out=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", *TINY, *WORDS, f"run.name={name}"], cwd=ROOT, stdout=out,
        stderr=subprocess.STDOUT, env=job_environment(home), text=True,
    )  # fmt: skip


def finish(home, name):
    with start(home, name) as driver:
        text, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def whole(home):
    """The run that nobody disturbs: its directory."""
    finish(home, "whole")
    return home / "runs" / "whole"


def curve(run):
    found = losses(SimpleNamespace(directory=run))  # also compares steps that were done twice
    assert sorted(found) == list(range(1, max(found) + 1))
    return found


def newest_commit(run):
    steps = [int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/step-*/COMMITTED.json")]
    return max(steps, default=0)


def wait_for_commit(run, step, driver, said):
    until = time.monotonic() + 300
    while newest_commit(run) < step:
        assert driver.poll() is None, said.read_text()
        assert time.monotonic() < until
        time.sleep(0.02)


def resumptions(text):
    return [int(step) for step in re.findall(r"resumed from the checkpoint of step (\d+) of", text)]


def wait_for_words(said, count, driver):
    """What groups say first reaches the driver's output up to a second later, when steps are committed already."""
    until = time.monotonic() + 60
    while len(resumptions(said.read_text())) < count:
        assert driver.poll() is None, said.read_text()
        assert time.monotonic() < until
        time.sleep(0.02)


def workers(driver):
    """The group's processes, the oldest first."""
    found = psutil.Process(driver.pid).children(recursive=True)
    named = [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]
    return sorted(named, key=lambda process: process.create_time())


def test_three_kills_of_workers_and_one_of_the_driver_change_no_loss(home, whole):
    expected = curve(whole)
    run, at, said = home / "runs" / "killed", [], home / "said.txt"
    with said.open("w") as out, start(home, "killed", out) as driver:
        for number, victim in enumerate((0, -1, 0)):
            wait_for_commit(run, (at[-1] if at else 0) + MARGIN, driver, said)
            wait_for_words(said, number, driver)
            at.append(newest_commit(run))
            group = workers(driver)
            os.kill(group[victim].pid, signal.SIGKILL)
            psutil.wait_procs(group, timeout=60)  # of the group that is over nothing more can be committed
        wait_for_commit(run, at[-1] + MARGIN, driver, said)
        wait_for_words(said, 3, driver)
        at.append(newest_commit(run))
        driver.kill()
    text = said.read_text()
    assert [f"failure {n} of at most 3" in text for n in (1, 2, 3, 4)] == [True, True, True, False], text
    resumed = resumptions(text)
    assert len(resumed) == 3
    assert all(step >= seen for step, seen in zip(resumed, at, strict=False)), "a commit that was seen is not lost"
    assert at[-1] < max(expected), "killed in mid-run"

    text = finish(home, "killed")
    assert "attempt 2" in text
    assert resumptions(text)[0] >= at[-1]
    assert curve(run) == expected  # every bit
    ledger = Trace.loads((run / KEY).read_bytes()).ledger
    assert ledger.restarts == 4
    assert ledger.seconds["restart"] > 0


def test_under_ray_less_than_a_hundredth_of_the_time_is_unaccounted_for(whole):
    trace = json.loads((whole / KEY).read_bytes())
    assert trace["world"] == 2
    assert trace["ended"]
    ledger = Trace.loads((whole / KEY).read_bytes()).ledger
    assert set(ledger.seconds) == set(CLASSES)
    assert ledger.seconds["compute"] > 0
    assert 0 <= ledger.unaccounted < 0.01 * ledger.elapsed, ledger.describe()
