"""S3: a quick double for the paths, and SeaweedFS, which enforces credentials, for what can go wrong."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.index_shards import main as index_main
from jobs.make_shards import main as make_main
from orchestrator.data.config import CacheConfig, DataConfig
from orchestrator.data.errors import DataError, DataGoneError, StoreError
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.preflight import open_dataset
from orchestrator.data.store import StoreConfig, open_store
from orchestrator.data.views import TrainView
from tests.faults.fault_server import FaultServer

KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}


def free_port():
    """A port whose sum with 10,000 is a port too: SeaweedFS puts its internal services there."""
    for port in random.sample(range(12_000, 30_000), 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Weed:
    """One SeaweedFS process."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{(port := free_port())}"
        binary = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
        command = [binary, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"]
        ports = [f"-{name}={free_port()}" for name in ("master.port", "filer.port", "volume.port", "admin.port")]
        self.process = subprocess.Popen(
            [*command, *ports, "-webdav=false", "-bucket", "data"], env=os.environ | KEYS, cwd=folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait(self) -> None:
        """Until the bucket answers."""
        store = open_store("s3://data", StoreConfig(endpoint=self.endpoint, retries=1))
        for _ in range(120):
            try:
                store.write("ready", b"1")
            except StoreError:
                time.sleep(0.5)
            else:
                return
        raise TimeoutError(f"SeaweedFS at {self.endpoint} did not answer within 60 s")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    os.environ.update(KEYS)  # a module's fixture comes before the test's environment
    server = Weed(tmp_path_factory.mktemp("weed"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def load(source, endpoint, **changes):
    store = StoreConfig(endpoint=endpoint, retries=2, retry_seconds=4.0)
    config = DataConfig(source=source, store=store, streams=2, run=10, block_runs=2, last_batch="short", **changes)
    split = Manifest.load(source, store).split("train")
    with open_loader(
        config, split, seed=0, epoch=0, first_batch=0, global_batch=8, rank=0, world=1, view=TrainView(16)
    ) as loader:
        batches = list(loader)
    return torch.cat([b.ids for b in batches]), torch.cat([b.images for b in batches])


def test_make_shards_to_s3_and_train_from_it(moto, photos, tmp_path, capsys):
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1")
    client.create_bucket(Bucket="quick")
    arguments = [str(photos), "s3://quick/set", "--endpoint", moto, "--shard-samples", "20"]
    assert make_main(arguments) == 0
    assert make_main(arguments) == 0
    assert "already there, verified: s3://quick/set" in capsys.readouterr().out
    assert make_main([str(photos), str(tmp_path / "local"), "--shard-samples", "20"]) == 0
    remote_ids, remote_images = load("s3://quick/set", moto)
    local_ids, local_images = load(str(tmp_path / "local"), "")
    assert remote_ids.equal(local_ids)
    assert remote_images.equal(local_images)
    etags = {s.name: s.etag for s in Manifest.load("s3://quick/set", StoreConfig(endpoint=moto)).splits["train"]}
    for name, etag in etags.items():
        assert client.head_object(Bucket="quick", Key=f"set/{name}")["ETag"] == etag


def test_index_an_existing_bucket_under_another_prefix(moto, photos, tmp_path, capsys):
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1")
    client.create_bucket(Bucket="theirs")
    client.create_bucket(Bucket="ours")
    assert make_main([str(photos), str(tmp_path / "local"), "--shard-samples", "20"]) == 0
    for path in (tmp_path / "local").glob("*.tar"):
        client.upload_file(str(path), "theirs", f"deep/{path.name}")
    arguments = ["s3://theirs/deep/{train,val}-*.tar", "--to", "s3://ours/index", "--endpoint", moto]
    assert index_main(arguments) == 0
    assert index_main(arguments) == 0
    assert "indexes    4 reused" in capsys.readouterr().out
    assert {o["Key"].rsplit(".")[-1] for o in client.list_objects_v2(Bucket="theirs")["Contents"]} == {"tar"}
    assert load("s3://ours/index", moto)[1].equal(load(str(tmp_path / "local"), "")[1])
    assert len(load("s3://ours/index/train-{000000..000001}.tar", moto)[0]) == 40
    assert index_main(["s3://ours/index", "--endpoint", moto, "--verify"]) == 0

    body = bytearray(client.get_object(Bucket="theirs", Key="deep/train-000001.tar")["Body"].read())
    body[6000] ^= 1
    client.put_object(Bucket="theirs", Key="deep/train-000001.tar", Body=bytes(body))
    assert index_main(["s3://ours/index", "--endpoint", moto, "--verify"]) == 1
    assert "damaged: s3://theirs/deep/train-000001.tar" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"train-000001\.tar is not the object of the manifest"):
        open_dataset(DataConfig(source="s3://ours/index", store=StoreConfig(endpoint=moto)))


def test_worker_processes_use_the_credentials_of_today(photos, tmp_path, monkeypatch):
    """The fork server is older than they are, and keeps the environment of its own start."""
    assert make_main([str(photos), str(tmp_path / "bucket" / "set"), "--shard-samples", "20"]) == 0
    with FaultServer(tmp_path) as server:
        for key in ("earlier", "renewed"):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
            server.signed_by.clear()
            load("s3://bucket/set", server.uri, workers=1)
            assert server.signed_by == {key}


@pytest.mark.long
def test_real_store_same_images_in_processes_and_through_a_cache(weed, photos, tmp_path):
    assert make_main([str(photos), "s3://data/set", "--endpoint", weed.endpoint, "--shard-samples", "20"]) == 0
    assert make_main([str(photos), str(tmp_path / "local"), "--shard-samples", "20"]) == 0
    expected = load(str(tmp_path / "local"), "")[1]
    assert load("s3://data/set", weed.endpoint)[1].equal(expected)
    assert load("s3://data/set", weed.endpoint, workers=2)[1].equal(expected)
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    for _ in range(2):
        assert load("s3://data/set", weed.endpoint, cache=cache)[1].equal(expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "environment", "text"),
    [
        ("s3://data/set", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "access refused; check the credentials"),
        ("s3://data/set", {"AWS_ACCESS_KEY_ID": "wrong"}, "access refused; check the credentials"),
        ("s3://nowhere/set", {}, "there is no such bucket; check the name"),
        ("s3://data/empty", {}, "nor any tar; make shards with"),
    ],
)
def test_real_store_clear_lines(weed, source, environment, text, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = DataConfig(source=source, store=StoreConfig(endpoint=weed.endpoint))
    with pytest.raises(DataError, match=text) as caught:
        open_dataset(config)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_real_store_replaced_object(weed, photos):
    assert make_main([str(photos), "s3://data/changing", "--endpoint", weed.endpoint, "--shard-samples", "20"]) == 0
    store = open_store("s3://data/changing", StoreConfig(endpoint=weed.endpoint))
    store.write("train-000000.tar", store.read("train-000001.tar"))
    with pytest.raises(DataError, match="not the object of the manifest"):
        open_dataset(DataConfig(source="s3://data/changing", store=StoreConfig(endpoint=weed.endpoint)))
    with pytest.raises(DataError, match=r"train-000000\.tar, offset \d+ \(sample \d+\): .*has changed"):
        load("s3://data/changing", weed.endpoint)


@pytest.mark.long
def test_real_store_killed_in_the_middle_is_loud(photos, tmp_path):
    server = Weed(tmp_path)
    try:
        server.wait()
        assert make_main([str(photos), "s3://data/set", "--endpoint", server.endpoint, "--shard-samples", "5"]) == 0
        store = StoreConfig(endpoint=server.endpoint, retries=2, retry_seconds=4.0, give_up_s=3.0)
        config = DataConfig(source="s3://data/set", store=store, streams=1, run=5, block_runs=1, prefetch=1)
        split = Manifest.load("s3://data/set", store).split("train")
        with open_loader(
            config, split, seed=0, epoch=0, first_batch=0, global_batch=2, rank=0, world=1, view=TrainView(16)
        ) as loader:
            next(loader)
            server.stop()
            with pytest.raises(DataGoneError, match="cannot be reached"):
                list(loader)
    finally:
        server.stop()


@pytest.mark.long
def test_credentials_that_expire_in_the_middle_are_read_again(weed, photos, monkeypatch):
    assert make_main([str(photos), "s3://data/rotating", "--endpoint", weed.endpoint, "--shard-samples", "5"]) == 0
    store = StoreConfig(endpoint=weed.endpoint, give_up_s=120.0)
    config = DataConfig(source="s3://data/rotating", store=store, streams=1, run=5, block_runs=1, prefetch=1)
    split = Manifest.load("s3://data/rotating", store).split("train")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    with open_loader(
        config, split, seed=0, epoch=0, first_batch=0, global_batch=2, rank=0, world=1, view=TrainView(16)
    ) as loader:
        threading.Timer(3.0, os.environ.update, [KEYS]).start()
        batches = list(loader)
    assert len(batches) == split.samples // 2
    assert loader.counters.retries > 0
