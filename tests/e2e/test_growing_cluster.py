"""Clusters that have no room yet: a head without CPUs, with and without an autoscaler, real Ray and real jobs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.checkpoint.runlog import RunLog
from orchestrator.data.folder import Folder
from tests.faults.ray_head import head, node
from tests.support import TINY, write_shards

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
FAKE = {
    "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
    "provider": {"type": "fake_multinode"}, "head_node_type": "head", "auth": {}, "file_mounts": {},
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    **{
        key: [] for key in (
            "setup_commands", "cluster_synced_files", "initialization_commands", "head_setup_commands", "rsync_filter",
            "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude",
        )
    },
    "file_mounts_sync_continuously": False,
}  # fmt: skip


def prepared(folder):
    (folder / "data").mkdir()
    Path(write_shards(folder / "made", per_class=40)).rename(folder / "data" / "fashion-mnist")
    return folder


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A head without CPUs, to which nothing comes."""
    with head(prepared(tmp_path_factory.mktemp("still"))) as environment:
        yield environment


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """A head without CPUs whose autoscaler can start two nodes of one CPU, as Ray's own tests have them."""
    folder = prepared(tmp_path_factory.mktemp("growing"))
    (folder / "fake.json").write_text(json.dumps(FAKE))
    quick = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with head(folder, f"--autoscaling-config={folder}/fake.json", variables=quick) as environment:
        yield environment


# In a process of its own: Ray leaves threads and warnings behind.
ASK = """
import json, os, sys, ray
from itpn_core.errors import UserError
from orchestrator.launch.cluster import request
from orchestrator.launch.config import ClusterConfig
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
for limits, loaders, settings in json.loads(sys.argv[1]):
    try:
        found = request(ClusterConfig(**settings), loaders, {"ITPN_CLUSTER_MAX": limits})
        print(json.dumps([found.workers, found.cpus, found.gpus]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(environment, *questions):
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))], done


GPUS = "8 x CPU=14,GPU=1; 8 x CPU=14,GPU=1"


def test_what_an_autoscaler_can_bring_is_what_manifests_state(still):
    eight = {"workers": 8, "device": "cuda", "cpus_per_worker": 12}
    found, _ = ask(
        still,
        ["", 0, eight], [GPUS, 0, eight], [GPUS, 0, {**eight, "workers": 17}],
        [GPUS, 0, {**eight, "cpus_per_worker": 15}], [GPUS, 0, {"workers": 8}],
        ["16 CPUs", 0, eight], [GPUS, 0, {"workers": 16, "workers_min": 16, "device": "cpu", "cpus_per_worker": 14}],
    )  # fmt: skip
    assert "needs 8 GPUs, the cluster has 0" in found[0]
    assert found[1] == [8, 12, 1]
    assert "cluster.workers=17 needs 17 GPUs, the cluster has or can grow to (ITPN_CLUSTER_MAX) 16" in found[2]
    assert "can grow to (ITPN_CLUSTER_MAX) 224 and room for 0 such workers" in found[3], "no node has 15 CPUs"
    assert found[4] == [8, 1, 1], "auto finds the GPUs that are still to come"
    assert "ITPN_CLUSTER_MAX='16 CPUs' cannot be read at '16 CPUs'" in found[5]
    assert found[6] == [16, 14, 0]


def test_the_type_of_gpu_is_asked_of_the_cluster(still):
    known = "4 x CPU=14,GPU=1,accelerator_type:A100=1; 2 x CPU=14,GPU=1,accelerator_type:L4=1"
    four = {"workers": 4, "device": "cuda", "cpus_per_worker": 1, "accelerator": "A100"}
    found, _ = ask(
        still, [known, 0, four], [known, 0, {**four, "accelerator": "L4"}], [GPUS, 0, four],
        [known, 0, {**four, "device": "cpu"}],
    )  # fmt: skip
    assert found[0] == [4, 1, 1]
    assert "of cluster.accelerator=L4, the cluster has or can grow to (ITPN_CLUSTER_MAX) room for 2" in found[1]
    assert "its GPUs are A100, L4" in found[1]
    assert found[2] == [4, 1, 1], "where nobody names types they may be of any"
    assert "it needs cluster.device=cuda" in found[3]


def test_loaders_have_cpus_of_their_own_where_the_cluster_has_them(still):
    two = {"workers": 2, "device": "cpu"}
    found, done = ask(
        still, ["2 x CPU=8", 5, two], ["2 x CPU=4", 5, two], ["1 x CPU=2", 5, two], ["1 x CPU=1", 5, two],
        ["2 x CPU=4", 5, {**two, "cpus_per_worker": 6}],
    )  # fmt: skip
    assert found[:3] == [[2, 6, 0], [2, 4, 0], [2, 1, 0]]
    assert (
        "cluster.cpus_per_worker: 4 for each of 2 workers, where 6 (itself and data.workers) are wanted" in done.stdout
    )
    assert "room for 0 such workers" in found[3]
    assert "room for 0 such workers" in found[4], "what somebody has set is not made smaller"


def test_an_autoscaler_without_limits_is_a_warning(growing):
    (found,), done = ask(growing, ["", 0, {"workers": 9, "device": "cpu", "cpus_per_worker": 1}])
    assert found == [9, 1, 0]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "An autoscaler runs, whose limits are not known (ITPN_CLUSTER_MAX states them): the run waits" in line


REPORT = """
import os, ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
state = AutoscalingState(last_seen_cluster_resource_state_version=1, autoscaler_state_version=1)
ray._private.worker.global_worker.gcs_client.report_autoscaling_state(state.SerializeToString())
"""


def test_the_autoscaler_beside_a_kuberay_head_is_seen(tmp_path):
    """Version 2 of the autoscaler runs in a container of its own and reports to the head, which KubeRay has named."""
    asked = ["", 0, {"workers": 9, "device": "cpu", "cpus_per_worker": 1}]
    with head(tmp_path, "--no-monitor", variables={"RAY_CLOUD_INSTANCE_ID": "itpn-head-x"}) as environment:
        (before,), _ = ask(environment, asked)
        assert "room for 0 such workers" in before
        subprocess.run([sys.executable, "-c", REPORT], env=environment, check=True, timeout=120, capture_output=True)
        (after,), done = ask(environment, asked)
        assert after == [9, 1, 0]
        assert "An autoscaler runs" in done.stderr


def test_an_autoscaler_that_only_watches_brings_no_nodes(still):
    (found,), _ = ask(still, ["", 0, {"workers": 1, "device": "cpu"}])
    assert "room for 0 such workers" in found


# -- runs --------------------------------------------------------------------------------------------------------------


def start(environment, *words, **variables):
    settings = [word for word in TINY if not word.startswith("track.follow")]
    return subprocess.Popen(
        [sys.executable, "jobs/pretrain.py", *settings, "eval.queries=8", *words], cwd=ROOT,
        env={**environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until_nodes(environment, count):
    code = "import os, ray; ray.init(address=os.environ['RAY_ADDRESS']); print('nodes', len(ray.nodes()))"
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [sys.executable, "-c", code.replace("ray.nodes()", "[n for n in ray.nodes() if n['Alive']]")],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if f"nodes {count}" in done.stdout:
            return
        assert time.monotonic() < deadline, done.stdout + done.stderr


def record_of(environment, name):
    return json.loads(Path(environment["ITPN_HOME"], "runs", name, "run.json").read_text())


def tags_of(environment, name):
    client = MlflowClient(f"sqlite:///{environment['ITPN_HOME']}/runs/mlflow.db")
    found = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    (run,) = [run for run in found if run.info.run_name == name]
    return run.data.tags, run.info.status


def read_to(process, word):
    """What is printed up to a line with the word."""
    text = ""
    while word not in text:
        line = process.stdout.readline()  # ends with the process
        assert line, text
        text += line
    return text


def stop_when(process, word, pause_s=0.0):
    """SIGTERM once a line with the word is printed; returns (all that was printed, seconds from signal to end)."""
    text = read_to(process, word)
    time.sleep(pause_s)
    asked = time.monotonic()
    process.terminate()
    text += process.communicate(timeout=120)[0]
    return text, time.monotonic() - asked


@pytest.mark.parametrize("low", [9, 0], ids=["elastic", "fixed"])
def test_a_stop_while_the_run_waits_for_nodes_ends_it_at_once(growing, low):
    name = f"waits-{low}"
    words = (f"run.name={name}", "cluster.workers=9", f"cluster.workers_min={low}", "train.global_batch=18")
    text, took = stop_when(process := start(growing, *words), "evaluation inside", 8)
    assert process.returncode == 0, text
    assert "the run waits for nodes" in text
    assert "stopped (SIGTERM) while no workers ran" in text
    assert took < 30
    assert record_of(growing, name)["state"] == "stopped"
    tags, status = tags_of(growing, name)
    assert (tags["run.state"], tags["run.reason"], status) == ("stopped", "SIGTERM", "KILLED")
    last = RunLog(Folder(f"{growing['ITPN_HOME']}/runs/{name}")).last()
    again, _ = stop_when(process := start(growing, *words), "evaluation inside")
    assert process.returncode == 0, again
    assert "held" not in again, (last, again)
    assert "has not renewed its lease" not in again, "the lease was given back"
    assert "its process is gone" not in again


@pytest.mark.parametrize("pause_s", [0.0, 0.5], ids=["before", "within"])
def test_a_stop_before_the_cluster_is_joined_is_a_stop_too(growing, pause_s):
    """Also one that comes inside Ray's `init`, which takes a second or two."""
    name = f"early-{pause_s}"
    text, took = stop_when(process := start(growing, f"run.name={name}"), f"run {name} (start)", pause_s)
    assert process.returncode == 0, text
    assert took < 30
    assert record_of(growing, name)["state"] == "stopped"
    assert "Traceback" not in text
    assert "SIGTERM handler" not in text, "Ray's word on where it runs"


def test_an_elastic_run_that_never_gets_its_nodes_ends_and_says_so(growing):
    process = start(
        growing, "run.name=never", "cluster.workers=9", "cluster.workers_min=8", "train.global_batch=18",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="4",
    )  # fmt: skip
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 1, text
    assert re.search(
        r"error: the run failed: no worker group ran for \d+ s: 8 workers with 1 CPU each are needed, and the"
        r" nodes that are there hold \d\.",
        text,
    )
    tags, status = tags_of(growing, "never")
    assert (tags["run.state"], status) == ("failed", "FAILED")


def test_a_run_for_which_nodes_must_come_trains(still, tmp_path):
    """Stated limits, no warning, and the node comes after the run has started to wait."""
    process = start(still, "run.name=grown", "cluster.workers=2", ITPN_CLUSTER_MAX="2 x CPU=1")
    text = read_to(process, "evaluation inside")
    with node(still, tmp_path / "node.log", 2, {}):
        text += process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert "warning" not in text
    assert record_of(still, "grown")["state"] == "finished"


OTHER_TORCH = """
from importlib import metadata
true = metadata.version
metadata.version = lambda name: "0.1" if name == "torch" else true(name)
"""


def other_torch(folder):
    """Variables of a node on which torch says that it is of another version."""
    (folder / "sitecustomize.py").write_text(OTHER_TORCH)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_a_node_that_comes_later_is_compared_too(still, tmp_path):
    until_nodes(still, 1)  # the node of a test before is no longer counted
    process = start(still, "run.name=later", "cluster.workers=1", ITPN_CLUSTER_MAX="2 x CPU=1")
    text = read_to(process, "evaluation inside")
    with node(still, tmp_path / "node.log", 1, other_torch(tmp_path)):
        text += process.communicate(timeout=300)[0]
    assert process.returncode == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert re.match(r"error: node \S+ \(host \S+\) has torch 0\.1, the driver has \S+: submit the job with", line)
    assert "Traceback" not in text
    tags, status = tags_of(still, "later")
    assert (tags["run.state"], status) == ("failed", "FAILED")


def test_nodes_that_are_there_are_asked_before_a_start(still, tmp_path):
    until_nodes(still, 1)
    with node(still, tmp_path / "node.log", 1, other_torch(tmp_path)):
        until_nodes(still, 2)
        process = start(still, "run.name=compared", "cluster.workers=1")
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 2, text
    assert re.search(r"error: node \S+ \(host \S+\) has torch 0\.1, the driver has", text)
    assert "evaluation inside" not in text


def test_limits_that_cannot_be_read_end_the_run_with_one_line(still):
    process = start(still, "run.name=unread", ITPN_CLUSTER_MAX="GPU=16")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    assert "ITPN_CLUSTER_MAX='GPU=16' cannot be read" in line
    assert "Traceback" not in text
    tags, status = tags_of(still, "unread")
    assert (tags["run.state"], status) == ("failed", "FAILED")
    assert "ITPN_CLUSTER_MAX" in tags["run.reason"]
