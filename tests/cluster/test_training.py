"""A submitted run on several hosts: what it survives, how it stops, and what it trained on in the end."""

import re
import time

import pytest

from tests.cluster.cluster import RUNS, SHARDS, Cluster
from tests.cluster.hosts import until
from tests.cluster.lineage import check_lineage, groups
from tests.support import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
BATCH = 16
PER_EPOCH = 45
"""Steps: 720 training samples in batches of 16."""


@pytest.fixture
def whole(cluster):
    """The cluster with every host on, joined and known to Ray, whatever the test before did to it."""
    cluster.heal()
    return cluster


def records(cluster: Cluster, name: str) -> list[dict]:
    return [cluster.json(key) for key in cluster.keys(f"recorded/{name}/")]


def step_of(cluster: Cluster, name: str) -> int:
    """The last step that a rank of the run has done, -1 before the first."""
    return max((step["step"] for record in records(cluster, name) for step in record["steps"]), default=-1)


def wait_for_step(cluster: Cluster, job, name: str, step: int) -> None:
    until(lambda: step_of(cluster, name) >= step or not job.running, 180, f"{name} at step {step}", 0.3)
    assert job.running, job.text


def wait_for_group(cluster: Cluster, job, name: str, count: int) -> None:
    """Waits until the run's worker group number `count` has done a step."""
    until(lambda: len(groups(records(cluster, name))) >= count or not job.running, 240, f"{name}, group {count}", 0.5)
    assert job.running, job.text


def start(cluster: Cluster, name: str, *settings: str):
    """A run of four epochs with a checkpoint per 40 steps; an epoch takes about 14 s."""
    return cluster.pretrain(
        name, "cluster.workers=2", "train.epochs=4", "checkpoint.every_steps=40", "checkpoint.every_epochs=0",
        *settings, pace_s=0.3,
    )  # fmt: skip


def test_with_a_wrong_token_no_job_starts(whole):
    (whole.head.files / "run" / "wrong-token").write_text("f" * 32)
    job = whole.pretrain("refused", token="/run/wrong-token")
    assert job.wait(60) == 1
    assert "token" in job.text.lower()
    listed = whole.head.run(["ray", "job", "list", "--address", whole.dashboard], whole.environment(whole.head))
    assert listed.returncode == 0
    assert job.name not in listed.stdout
    assert whole.keys("runs/refused/") == []


def test_storage_that_one_host_does_not_reach_is_said_before_any_worker_starts(whole):
    """The driver's host reaches it and one of three worker hosts has no route."""
    host = whole.workers[1]
    route = ["blackhole", f"{whole.storage.address}/32"]
    assert host.run(["ip", "route", "add", *route], whole.environment(host)).returncode == 0
    try:
        began = time.monotonic()
        job = whole.pretrain("unreachable", "cluster.workers=3")
        assert job.wait(120) != 0
        took = time.monotonic() - began
    finally:
        assert host.run(["ip", "route", "del", *route], whole.environment(host)).returncode == 0
    # Ray shows the end of the output twice.
    (line,) = {line for line in job.text.splitlines() if line.startswith("error: ")}
    assert "cannot reach run storage" in line
    assert "which the driver can" in line
    assert host.address in line
    assert "exit code 2" in job.text
    assert took < 90, "Ray's start of a job and the limit for reaching storage"
    assert whole.keys("runs/unreachable/checkpoints/") == []
    assert records(whole, "unreachable") == []


def test_killed_hosts_cost_only_the_steps_since_the_last_checkpoint(whole):
    """Two of three hosts are killed in mid-epoch, one after the other; the first is back before the second dies."""
    job = start(whole, "killed")
    wait_for_step(whole, job, "killed", 70)
    first = whole.hosts_in_use()[0]
    assert len(whole.hosts_in_use()) == 2
    first.kill()
    wait_for_group(whole, job, "killed", 2)
    assert first not in whole.hosts_in_use()
    whole.restart(first)
    until(lambda: first.address in whole.nodes(), 90, "the host is back in the cluster", 1)
    wait_for_step(whole, job, "killed", 110)
    second = whole.hosts_in_use()[0]
    second.kill()
    assert job.wait(400) == 0, job.text

    found = groups(records(whole, "killed"))
    assert [group.first for group in found] == [0, 40, 80], "each group begins where the last checkpoint was committed"
    assert first.name in found[0].hosts
    assert first.name not in found[1].hosts
    assert first.name in found[2].hosts, "the host that came back is used again"
    redone = check_lineage(found, total=4 * PER_EPOCH, batch=BATCH)
    assert redone >= 50  # steps 40 to 70 and 80 to 110
    # The ledger's trace on storage is up to five seconds old when a host dies: of each kill it may miss 17 steps.
    ledger = whole.json("runs/killed/ledger.json")["ledger"]
    assert ledger["restarts"] == 2
    assert redone - 2 * 18 <= ledger["redone_steps"] <= redone + 2
    assert ledger["seconds"]["lost"] > 0
    assert ledger["seconds"]["restart"] > 0
    assert job.text.count("resumed from the checkpoint of step") == 2


def test_hosts_that_hold_parts_of_the_model_go_on_without_one_of_them(whole):
    """Every worker writes its rows into the bucket; a group with another host reads those of the one that is gone."""
    job = start(whole, "parts", "train.parallel=shard")
    wait_for_step(whole, job, "parts", 70)
    folder = whole.keys("runs/parts/checkpoints/step-00000040/")
    assert len([key for key in folder if "-of-00002.safetensors" in key]) == 2
    whole.hosts_in_use()[0].kill()
    assert job.wait(400) == 0, job.text
    found = groups(records(whole, "parts"))
    assert [group.first for group in found] == [0, 40]
    check_lineage(found, total=4 * PER_EPOCH, batch=BATCH)


def test_ray_job_stop_saves_in_time_and_the_run_resumes_where_it_stopped(whole):
    job = start(whole, "stopped")
    wait_for_step(whole, job, "stopped", 55)
    asked = time.monotonic()
    job.stop()
    assert job.wait(60) == 0, job.text  # Ray's answer for a job that was stopped
    took = time.monotonic() - asked
    assert took < 60
    stopped = int(re.search(r"stopped \(SIGTERM\) at step (\d+)", job.text)[1])
    assert whole.committed("stopped") == stopped
    assert whole.json("runs/stopped/run.json")["state"] == "stopped"
    assert stopped % 40, "the checkpoint is that of the stop, not an earlier one"

    again = start(whole, "stopped")
    assert again.wait(300) == 0, again.text
    assert f"resumed from the checkpoint of step {stopped}" in again.text
    assert check_lineage(groups(records(whole, "stopped")), total=4 * PER_EPOCH, batch=BATCH) == 0


def test_a_host_drained_before_it_stops_loses_at_most_one_step(whole):
    """The preStop hook of a preemptible pool runs in the host; when the run has left it, the host goes."""
    job = start(whole, "drained")
    wait_for_step(whole, job, "drained", 60)
    host = whole.hosts_in_use()[0]
    whole.drain(host, 75)
    wait_for_group(whole, job, "drained", 2)
    host.kill()
    assert job.wait(300) == 0, job.text
    found = groups(records(whole, "drained"))
    assert host.name not in found[1].hosts
    assert check_lineage(found, total=4 * PER_EPOCH, batch=BATCH) <= 1
    assert "preempted" in [entry["state"] for entry in whole.json("runs/drained/run.json")["history"]]


def test_a_host_that_the_network_no_longer_reaches_stops_nothing(whole):
    """Neither side is told of the cut: no connection is closed."""
    job = start(whole, "cut")
    wait_for_step(whole, job, "cut", 60)
    host = whole.hosts_in_use()[0]
    host.cut()
    code = job.wait(500)
    assert code == 0, job.text
    found = groups(records(whole, "cut"))
    assert len(found) == 2
    assert host.name not in found[1].hosts
    check_lineage(found, total=4 * PER_EPOCH, batch=BATCH)


def test_evaluations_take_the_host_that_is_free_and_give_it_back(whole):
    """Two hosts train, the third measures checkpoints from the bucket; when one dies, the training needs the third."""
    job = start(whole, "beside", "eval.where=beside", "eval.every_epochs=1", "eval.bank=40")
    wait_for_step(whole, job, "beside", 70)
    host = whole.hosts_in_use()[0]
    host.kill()
    wait_for_group(whole, job, "beside", 2)
    whole.restart(host)
    assert job.wait(500) == 0, job.text
    check_lineage(groups(records(whole, "beside")), total=4 * PER_EPOCH, batch=BATCH)
    found = [whole.json(key) for key in whole.keys("runs/beside/evaluations/")]
    # Those of an epoch's end may have been left out while the training had all hosts, which is said, but not the first.
    assert found[0]["step"] == 0
    assert found[0]["state"] == "done"
    assert "eval/p4/linear_top1" in found[0]["metrics"]
    assert {result["state"] for result in found} <= {"done", "skipped"}
    assert len(found) == 4, job.text


def test_an_elastic_run_goes_on_with_fewer_hosts_and_grows_back(whole):
    job = whole.pretrain(
        "elastic", "cluster.workers=3", "cluster.workers_min=2", "cluster.resize_s=5", "train.epochs=100",
        "checkpoint.every_steps=20", "checkpoint.every_epochs=0", pace_s=0.3,
    )  # fmt: skip
    wait_for_step(whole, job, "elastic", 30)
    host = whole.hosts_in_use()[0]
    host.kill()
    wait_for_group(whole, job, "elastic", 2)
    whole.restart(host)
    wait_for_group(whole, job, "elastic", 3)
    job.stop()
    assert job.wait(90) == 0, job.text
    found = groups(records(whole, "elastic"))
    assert [group.world for group in found] == [3, 2, 3]
    assert host.name in found[2].hosts
    check_lineage(found, total=whole.committed("elastic"), batch=BATCH)


SPACE = """
sweep:
  space:
    drops: {choices: [0, 1]}
    model:
      migration:
        layers[0]: {choices: [0, 1], when: {drops: 1}}
        keep[0]: {choices: [0.5, 0.75, 0.9], when: {drops: 1}}
      gathering:
        window: {choices: [0, 2, 4]}
        tokens: {choices: [1, 4], when: {model.gathering.window: [2, 4]}, otherwise: 4}
"""


def test_six_trials_train_on_three_hosts_without_waiting_for_each_other(whole):
    """Tune's trials and their training workers share three CPUs: a trial that held one would starve its own worker."""
    (whole.head.files / "tmp" / "space.yaml").write_text(SPACE)
    tiny = [word for word in TINY if not word.startswith(("eval", "track"))]
    job = whole.submit(
        "jobs/sweep.py", "--recipe", "/tmp/space.yaml", *tiny, "eval.bank=16", "eval.k=3", "eval.batch=8",
        "eval.every_epochs=1", "eval.figure_images=0", "track.follow=false", "track.system_every_s=0",
        f"data.source={SHARDS}", f"run.storage={RUNS}", "run.name=swept", "sweep.mode=train", "sweep.trials=6",
        "sweep.objectives=[accuracy,gflops]", "cluster.workers=1",
    )  # fmt: skip
    assert job.wait(600) == 0, job.text
    assert "Failed to fetch metrics" not in job.text
    ends = [whole.json(key) for key in whole.keys("runs/swept/trials/") if key.endswith("/end.json")]
    assert [end["state"] for end in ends] == ["finished"] * 6, [end["error"] for end in ends]
