"""Runs in object storage: what rank 0's host and the driver's host each have, and what the run's story is made from."""

import shlex
import shutil
import time

import boto3
import pytest
from mlflow import MlflowClient

from jobs.sync_runs import main
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.launch.finish import keep, tell_story
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.figures import curve_figure
from orchestrator.track.journal import records, segments, streams
from orchestrator.track.recorder import Recorder
from orchestrator.train.hosts import HostLoad, describe
from tests.support import LocalRun, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """One database for all: setting it up takes MLflow seconds."""
    return resolve(TrackConfig(poll_s=0.02), tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    from moto.server import ThreadedMotoServer

    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
    yield Folder(f"s3://runs/{tmp_path.name}", StoreConfig(endpoint=endpoint))  # its memory outlives a server
    server.stop()


def test_the_driver_tells_the_whole_story_of_a_run_on_another_host(config, folder, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    rank0 = Recorder(config, "uid", there, name="photos", role="rank0")
    committed = CommittedJournal(folder, there)
    for step in range(10):
        rank0.metrics(step, {"train/loss": 2.0 / (step + 1)})
        if step == 4:
            committed.commit(rank0.close_segment())
    curve_figure(there / "figures" / "one.png", {"a": [(0, 1.0), (1, 2.0)]}, title="one")
    rank0.artifact(there / "figures" / "one.png", "figures")
    rest = rank0.close_segment()
    assert rank0.close(60).empty
    committed.commit(rest)
    shutil.rmtree(there)

    driver = Recorder(config, "uid", here, name="photos", role="driver")
    driver.state("finished", "all steps done")
    tell_story(driver, folder)
    backlog = driver.close(60)
    assert backlog.empty, str(backlog)  # the picture is not here, but the server has it: nothing is refused
    told = (here / "track" / "files" / "report.html").read_text()
    assert "train/loss" in told
    assert "2 → 0.2" in told
    assert "all steps done" in told
    client = MlflowClient(config.uri)
    (stream,) = [name.path for name in client.list_artifacts(backlog.run_id, "journal")]
    assert [item.path for item in client.list_artifacts(backlog.run_id, stream)] == [
        f"{stream}/000001.jsonl", f"{stream}/000002.jsonl"
    ]  # fmt: skip
    assert [point.step for point in client.get_metric_history(backlog.run_id, "train/loss")] == list(range(10))


def test_a_run_is_replayed_from_object_storage_after_its_hosts_are_gone(folder, tmp_path, capfd):
    """The server is away from the first record to the last, and both disks go with the job."""
    dead = "http://127.0.0.1:9"
    down = TrackConfig(uri=dead, poll_s=0.02, experiment="gone")
    there, here = tmp_path / "there", tmp_path / "here"
    rank0 = Recorder(down, "uid of the gone", there, name="photos", storage=folder.remote())
    for step in range(10):
        rank0.metrics(step, {"train/loss": 2.0 / (step + 1)})
    rank0.text("config.yaml", "a: 1")
    curve_figure(there / "figures" / "one.png", {"a": [(0, 1.0), (1, 2.0)]}, title="one")
    rank0.artifact(there / "figures", "figures")
    rest = rank0.close_segment()
    said = rank0.close(0.1)
    committed = CommittedJournal(folder, there)
    committed.commit(rest)
    committed.keep_files()
    shutil.rmtree(there)
    driver = Recorder(down, "uid of the gone", here, name="photos", role="driver", storage=folder.remote())
    tell_story(driver, folder)
    driver.state("finished", "all steps done")
    segment = driver.close_segment()
    driver.close(0.1)
    keep(folder, driver, segment)
    shutil.rmtree(here)

    words = shlex.split(said.replay)
    assert words[:3] == ["python", "jobs/sync_runs.py", folder.uri]
    assert main([*words[2 : words.index("--uri")], "--patience", "1", "--uri", dead]) == 1
    server = f"sqlite:///{tmp_path}/again.db"
    capfd.readouterr()
    for _ in range(2):  # again changes nothing
        assert main([*words[2 : words.index("--uri")], "--uri", server]) == 0
    assert "0 waiting, 0 refused" in capfd.readouterr().out
    client = MlflowClient(server)
    (found,) = client.search_runs([client.get_experiment_by_name("gone").experiment_id])
    assert found.info.status == "FINISHED"
    losses = [point.value for point in client.get_metric_history(found.info.run_id, "train/loss")]
    assert losses == [2.0 / step for step in range(1, 11)]
    kept = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "figures", "report.html", "journal"} <= kept


def test_replay_from_object_storage_says_what_is_wrong(folder, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    endpoint = folder.remote()[2]
    assert main([f"{folder.uri}/none", "--endpoint", endpoint, "--uri", "sqlite:///x.db"]) == 2
    assert "holds no journal" in capsys.readouterr().err
    assert main(["s3://absent-bucket/run", "--endpoint", endpoint, "--uri", "sqlite:///x.db"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_picture_that_died_with_its_host_unshipped_is_said(config, folder, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    lost = Recorder(config, "uid of a lost picture", there, follow=False)
    lost.artifact(there / "gone.png", "figures")
    rest = lost.close_segment()
    lost.close(0)
    CommittedJournal(folder, there).commit(rest)
    shutil.rmtree(there)
    driver = Recorder(config, "uid of a lost picture", here, role="driver")
    tell_story(driver, folder)
    assert driver.close(60).refused == 1
    assert "gone.png" in (here / "track" / "refused.jsonl").read_text()


def test_a_host_without_rank_0_records_its_load(folder, tmp_path):
    run = LocalRun(config := tiny_config("unused", tmp_path, "track.system_every_s=0.02"), rank=1, world=2)
    run.folder, run.directory = folder, tmp_path / "there"
    steps = iter(range(1, 10_000))
    load = HostLoad(config, run, 1, lambda: next(steps))
    until = time.monotonic() + 60
    while not list(records(run.directory)):
        assert time.monotonic() < until
        time.sleep(0.02)
    load.close()
    here = tmp_path / "here"
    CommittedJournal(folder, here).restore()
    (stream,) = streams(here)
    assert "node1" in stream.name
    assert segments(stream)
    names = {name for record in records(here) for name in record.event.values}
    assert "system/node1/cpu_utilization_percentage" in names
    assert all(name.startswith("system/node1/") for name in names)


@pytest.mark.parametrize(
    ("places", "rank", "node", "leads", "shape"),
    [
        (["a"], 0, 0, True, "1 host, 1 rank, CPU"),
        (["a", "a"], 1, 0, False, "1 host, 2 ranks, CPU"),
        (["a", "a", "b", "b"], 2, 1, True, "2 hosts, 4 ranks (2 on each), CPU"),
        (["b", "a", "b"], 1, 1, True, "2 hosts, 3 ranks (2+1), CPU"),
    ],
)
def test_the_shape_of_the_cluster_in_words(places, rank, node, leads, shape):
    hosts = describe([(place, "CPU") for place in places], rank)
    assert (hosts.node, hosts.leads, hosts.shape) == (node, leads, shape)
