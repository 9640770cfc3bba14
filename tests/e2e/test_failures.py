"""What a person sees when storage, MLflow, a disk or a rank fails under a real job: exit code, state, what is left."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from tests.e2e.test_one_driver import ray_head
from tests.faults.gate import Gate
from tests.faults.test_checkpoint_faults import fill
from tests.support import TINY, hearing_hangups, job_environment, write_home

ROOT = Path(__file__).resolve().parents[2]
SLOW = (
    "train.log_every=1",
    "checkpoint.every_steps=2",
    "checkpoint.every_epochs=0",
    "eval.where=inside",
    "data.prefetch=1",
)
ENDLESS = (*SLOW, "train.epochs=100000")
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


class Surroundings:
    """A Ray head, a home with data, and an S3 server whose door can be shut."""

    def __init__(self, gate, home, environment):
        self.gate, self.home, self.environment = gate, home, environment

    def start(self, *words, program="jobs/pretrain.py"):
        self.gate.refuse = lambda method, path: False
        command = [
            sys.executable, program, *TINY, "cluster.workers=1", "eval.queries=8", "data.store.retries=1",
            f"data.store.endpoint={self.gate.endpoint}", *words,
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def folder(self, name, where=""):
        return Folder(f"{where or self.home / 'runs'}/{name}", StoreConfig(endpoint=self.gate.endpoint))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    home = write_home(tmp_path_factory.mktemp("root"))
    with Gate() as gate, pytest.MonkeyPatch.context() as patch:
        for bucket in ("data", "runs"):
            gate.client.create_bucket(Bucket=bucket)
        for path in (home / "data" / "fashion-mnist").iterdir():
            gate.client.upload_file(str(path), "data", f"set/{path.name}")
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in gate.environment(home).items():
            patch.setenv(name, value)
        with ray_head(home, job_environment(home)) as environment:
            yield Surroundings(gate, home, environment)


def wait_for(what, done, job, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def ended(job, code, seconds=120):
    text = job.communicate(timeout=seconds)[0]
    assert job.returncode == code, text
    assert "Traceback" not in text
    return text


def committed(folder):
    return CheckpointStore(folder, keep=3).steps()


def record(folder):
    return json.loads(folder.get("run.json"))


def test_data_that_stay_away_end_the_run_with_4(here):
    folder = here.folder("away")
    job = here.start("run.name=away", "data.source=s3://data/set", "data.store.give_up_s=3", *ENDLESS)
    wait_for("two commits", lambda: len(committed(folder)) > 1, job)
    here.gate.refuse = lambda method, path: path.startswith("/data/")
    text = ended(job, 4)
    assert "error: training data could not be read for 3 s (data.store.give_up_s)" in text
    assert "access refused; check the credentials" in text
    assert record(folder)["state"] == "failed"
    assert "data.store.give_up_s" in record(folder)["history"][-1]["reason"]
    assert CheckpointStore(folder, keep=3).load_newest().step == committed(folder)[-1]


def test_checkpoint_storage_that_stays_away_ends_the_run_with_4_and_training_goes_on_till_then(here):
    folder = here.folder("full", "s3://runs")
    job = here.start(
        "run.name=full", "run.storage=s3://runs", "checkpoint.max_age_s=3", "checkpoint.retry_s=0.5", *ENDLESS
    )
    wait_for("two commits", lambda: len(committed(folder)) > 1, job)
    here.gate.refuse = lambda method, path: method == "PUT" and "/checkpoints/" in path
    text = ended(job, 4)
    warning, error = text.index("warning: a checkpoint was not saved"), text.index("error: no checkpoint could be")
    assert warning < error
    assert re.search(r"no checkpoint could be committed for \d+ s, longer than checkpoint.max_age_s=3 allows", text)
    last = CheckpointStore(folder, keep=3).load_newest()
    assert last.step == committed(folder)[-1]
    assert record(folder)["state"] == "failed"
    windows = journal(here, folder)
    failed = {values["checkpoint/failed"]: step for step, values in windows if values.get("checkpoint/failing")}
    assert max(failed) > 1, "saves were tried again"
    assert max(step for step, _ in windows) > min(failed.values()) > last.step, "training went on meanwhile"


@pytest.fixture
def small_track(here):
    """A run's folder `track` on a file system of its own, which is soon full."""
    place = here.home / "runs" / "unwritten" / "track"
    place.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_journal_that_its_disk_does_not_take_ends_the_run_with_1_after_a_checkpoint(here, small_track):
    folder = here.folder("unwritten")
    job = here.start("run.name=unwritten", *ENDLESS)
    wait_for("a commit", lambda: committed(folder), job)
    fill(small_track / "filler")
    text = ended(job, 1)
    told = "the journal of this run cannot be written"
    assert text.index(f"error: {told}") < text.index(f"error: {told}", text.index(told) + 1), "told before the end"
    assert "No space left on device" in text
    assert "type the same command again" in text
    assert record(folder)["state"] == "failed"
    assert told in record(folder)["history"][-1]["reason"]
    assert CheckpointStore(folder, keep=3).load_newest().step == committed(folder)[-1]


UNTRACKED = ("track.uri=http://127.0.0.1:9", "track.follow=true", "track.close_timeout_s=1", "run.storage=s3://runs")


def test_mlflow_that_is_away_changes_nothing_and_the_command_that_is_named_ships_the_backlog(here, tmp_path):
    text = ended(here.start("run.name=untracked", *UNTRACKED), 0)
    assert "warning: MLflow cannot be reached" in text
    assert "k-NN" in text
    assert record(here.folder("untracked", "s3://runs"))["state"] == "finished"
    for place in Path("/tmp").glob("itpn-run-*"):  # a job's pod is gone by the time somebody replays
        if place.name.endswith(record(here.folder("untracked", "s3://runs"))["run_uid"]):
            shutil.rmtree(place)
    named = [line for line in text.splitlines() if "jobs/sync_runs.py s3://runs/untracked" in line][-1]
    words = shlex.split(named[named.index("python jobs/") :])
    server = f"sqlite:///{tmp_path}/later.db"
    words[words.index("--uri") + 1] = server
    shipped = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=here.environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    assert "0 waiting, 0 refused" in shipped.stdout
    client = MlflowClient(server)
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) > 1
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "report.html", "weights", "journal"} <= names


def test_mlflow_that_is_required_and_away_ends_the_job_with_2_before_anything_is_written(here):
    text = ended(here.start("run.name=required", "track.required=true", *UNTRACKED), 2, 60)
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert "127.0.0.1:9" in line
    assert here.folder("required", "s3://runs").names() == []


def test_a_rank_that_fails_is_the_first_that_is_heard_and_the_job_ends_with_1(here):
    """A sample in one rank's part is damaged after the shards were indexed, and none may be."""
    broken = here.home / "data" / "broken"
    shutil.copytree(here.home / "data" / "fashion-mnist", broken)
    shard = max(broken.glob("train*.tar"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"\xff" * 600)
    folder = here.folder("broken")
    job = here.start(
        "run.name=broken", f"data.source={broken}", "cluster.workers=2", "cluster.max_failures=0",
        *ENDLESS,
    )  # fmt: skip
    text = ended(job, 1, 200)
    assert re.search(r"error: the run failed: rank [01] on \S+: .*" + re.escape(shard.name), text), text
    assert "Type the same command again to resume" in text
    kept = folder.get("failures/attempt-0001.txt").decode()
    assert shard.name in kept.splitlines()[0]
    assert record(folder)["state"] == "failed"


def test_a_mistake_that_one_rank_alone_finds_ends_the_job_with_1_within_a_minute_in_its_words(here):
    """The other rank waits for it in a collective call, whose own limit is half an hour."""
    folder = here.folder("alone")
    began = time.monotonic()
    job = here.start("run.name=alone", "cluster.workers=2", *ENDLESS, program="tests/e2e/one_rank_refuses.py")
    text = ended(job, 1)
    assert time.monotonic() - began < 300, "nobody waits for the limit of a collective call"
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert re.fullmatch(r"error: rank 1 on \S+: the teacher's weights on this host are torn", line)
    assert record(folder)["state"] == "failed"
    assert record(folder)["history"][-1]["reason"] in line


@hearing_hangups()
def test_a_terminal_that_closes_stops_a_run_on_a_ray_of_its_own_after_a_checkpoint(here):
    """As when an ssh session ends: the signal goes to the driver and to all that it has started."""
    home, folder = here.home, here.folder("closed")
    job = subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", *TINY, "eval.queries=8", "run.name=closed", *ENDLESS],
        cwd=ROOT, env=job_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for("a commit", lambda: committed(folder), job)
    os.killpg(job.pid, signal.SIGHUP)
    time.sleep(0.3)
    os.killpg(job.pid, signal.SIGHUP)  # the kernel says it, and the shell
    text = ended(job, 0)
    assert "SIGHUP: saving a checkpoint and stopping" in text
    step = int(re.search(r"stopped \(SIGHUP\) at step (\d+)", text)[1])
    assert committed(folder)[-1] == step
    assert record(folder)["state"] == "stopped"


def test_two_interrupts_end_the_job_with_130(here):
    folder = here.folder("twice")
    job = here.start("run.name=twice", *ENDLESS)
    wait_for("a commit", lambda: committed(folder), job)
    job.send_signal(signal.SIGINT)
    time.sleep(0.4)  # closer together they may reach the process as one
    job.send_signal(signal.SIGINT)
    text = ended(job, 130)
    assert "interrupted" in text
    assert CheckpointStore(folder, keep=3).load_newest() is not None


def test_credentials_that_are_refused_by_checkpoint_storage_alone_end_the_job_with_2_within_15_s(here):
    job = here.start("run.name=shut", "run.storage=s3://runs", "track.follow=false")
    here.gate.refuse = lambda method, path: path.startswith("/runs/")
    began = time.monotonic()
    text = ended(job, 2, 60)
    assert time.monotonic() - began < 15
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    assert "access refused; check the credentials" in line


def journal(here, folder):
    """(step, values) of all metrics that rank 0 of a run in the bucket wrote, on this host."""
    place = Path("/tmp") / f"itpn-run-{record(folder)['run_uid']}" / "track" / "journal"
    lines = [json.loads(line) for path in sorted(place.rglob("*.jsonl")) for line in path.read_text().splitlines()]
    return [(line["step"], line["values"]) for line in lines if line["kind"] == "metrics"]
