"""The fault table: whatever a server or disk does, full right bytes or a loud error; never a prefix, never zeros."""

import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.cache import DiskCache
from orchestrator.data.config import CacheConfig, DataConfig
from orchestrator.data.errors import (
    ChangedError,
    DataError,
    DataGoneError,
    NotFoundError,
    QuarantineError,
    ShortReadError,
    StoreError,
)
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.preflight import open_dataset
from orchestrator.data.shards import ShardOptions, make_shards
from orchestrator.data.store import StoreConfig, open_store
from orchestrator.data.views import TrainView
from tests.faults.fault_server import Fault, FaultServer

QUICK = StoreConfig(
    connect_seconds=1.0, read_seconds=0.4, request_seconds=5.0, retries=3, retry_seconds=5.0, give_up_s=0.0
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of 60 images in 2 shards, and one big random object."""
    source, dest = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = source / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    options = ShardOptions(val_fraction=0.0, shard_samples=30)
    make_shards(str(source), str(dest), options, cache=dest, say=lambda _: None)
    (dest / "big.tar").write_bytes(rng.bytes(1_000_000))
    return dest


# kind of fault, what one occurrence gives, what endless repetition gives
TABLE = [
    ("cut", "right", StoreError),
    ("reset", "right", StoreError),
    ("stall", "right", StoreError),
    ("503", "right", StoreError),
    ("slow_start", "right", "right"),
    ("short_range", ShortReadError, ShortReadError),
    ("no_length", ShortReadError, ShortReadError),
    ("ignore_range", ShortReadError, ShortReadError),
    ("changed", ChangedError, ChangedError),
    ("404", NotFoundError, NotFoundError),
    ("403", StoreError, StoreError),
]


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize(("kind", "once", "always"), TABLE)
def test_store(root, kind, once, always, times):
    data = (root / "big.tar").read_bytes()
    with FaultServer(root) as server:
        store = open_store(server.uri, QUICK)
        etag = store.head("big.tar").etag
        server.fault = Fault(kind, times)
        expected = once if times == 1 else always
        if expected == "right":
            assert store.read_range("big.tar", 1000, 700_000, etag) == data[1000:701_000]
        else:
            with pytest.raises(expected, match=r"big\.tar, offset 1000: ") as caught:
                store.read_range("big.tar", 1000, 700_000, etag)
            assert "\n" not in str(caught.value)


def load(server, store=QUICK, **changes):
    config = DataConfig(source=server.uri, store=store, streams=2, run=10, block_runs=2, last_batch="short", **changes)
    split = Manifest.load(server.uri, QUICK).split("train")
    with open_loader(
        config, split, seed=0, epoch=0, first_batch=0, global_batch=8, rank=0, world=1, view=TrainView(16)
    ) as loader:
        batches = list(loader)
    digest = hashlib.sha256(torch.cat([b.images for b in batches]).numpy().tobytes()).hexdigest()
    return digest, torch.cat([b.valid for b in batches]), loader.counters


@pytest.mark.parametrize(
    "kind", ["cut", "reset", "stall", "503", "zeros", "lying_range", "short_range", "no_length", "ignore_range", "404"]
)
def test_loader_gets_over_a_fault_that_passes(root, kind):
    """Also those that only the checksums can see: zeros of the right length, bytes of another range."""
    with FaultServer(root) as server:
        clean, valid, _ = load(server)
        assert valid.all()
        server.fault = Fault(kind, 1)
        again, valid, counters = load(server)
    assert again == clean
    assert valid.all()
    assert counters.damaged == []
    if kind in ("zeros", "lying_range", "short_range", "no_length", "ignore_range", "404"):
        assert counters.retries > 0


@pytest.mark.parametrize("kind", ["cut", "reset", "503", "403"])
def test_loader_stops_when_the_store_is_gone(root, kind):
    with FaultServer(root) as server:
        server.fault = Fault(kind, 10_000)
        with pytest.raises(DataGoneError, match=r"train-00000\d\.tar, offset \d+: "):
            load(server, quarantine_budget=60)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_waits_for_a_store_that_refuses_and_answers_again(root, workers):
    """Refused access is not tried again by the client; we do, with a new client, within data.store.give_up_s."""
    with FaultServer(root) as server:
        clean, _, _ = load(server)
        server.fault = Fault("403", 3)
        again, valid, counters = load(server, replace(QUICK, give_up_s=600.0), workers=workers)
    assert again == clean
    assert valid.all()
    assert counters.retries > 0


def test_loader_gives_up_in_the_end(root):
    with FaultServer(root) as server:
        server.fault = Fault("403", 100_000)
        began = time.monotonic()
        with pytest.raises(DataGoneError, match=r"could not be read for 1 s \(data.store.give_up_s\).*access refused"):
            load(server, replace(QUICK, give_up_s=1.0))
        assert time.monotonic() - began >= 1.0


def test_closing_does_not_wait_for_a_store_that_is_away(root):
    config = DataConfig(
        source="",
        store=replace(QUICK, give_up_s=600.0),
        streams=2,
        run=10,
        block_runs=2,
        last_batch="short",
        prefetch=1,
    )
    with FaultServer(root) as server:
        split = Manifest.load(server.uri, QUICK).split("train")
        loader = open_loader(
            config, split, seed=0, epoch=0, first_batch=0, global_batch=8, rank=0, world=1, view=TrainView(16)
        )
        next(loader)
        server.fault = Fault("403", 100_000)
        closer = threading.Thread(target=loader.close)
        closer.start()
        closer.join(60)
        assert not closer.is_alive()


@pytest.mark.parametrize("kind", ["zeros", "lying_range", "short_range", "no_length", "ignore_range", "changed", "404"])
def test_loader_quarantines_what_stays_wrong(root, kind, caplog):
    with FaultServer(root) as server:
        server.fault = Fault(kind, 100_000, match="train-000001.tar")
        with pytest.raises(QuarantineError, match=r"train-000001\.tar, offset \d+ \(sample \d+\): "):
            load(server)
        with caplog.at_level(logging.CRITICAL):
            _, valid, counters = load(server, quarantine_budget=30)
    assert sorted(counters.quarantined)[0] >= 30  # the first shard is whole
    assert len(counters.quarantined) == int((~valid).sum()) > 0


def test_an_object_replaced_during_the_run_is_noticed(root, tmp_path):
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with FaultServer(tmp_path) as server:
        manifest = Manifest.load(server.uri, QUICK)
        shard = manifest.splits["train"][0]
        (tmp_path / shard.name).write_bytes((tmp_path / manifest.splits["train"][1].name).read_bytes())
        with pytest.raises(DataError, match=r"not the object of the manifest|checksum|not the ones"):
            load(server)


def test_a_server_that_dies_is_an_error_in_finite_time(root):
    with FaultServer(root) as server:
        store = open_store(server.uri, QUICK)
    with pytest.raises(StoreError, match=r"the server cannot be reached; check the endpoint"):
        store.read_range("big.tar", 0, 10)


def test_preflight_lines(root, tmp_path):
    """One clear line each, before any worker starts."""
    with FaultServer(root) as server:
        config = DataConfig(source=server.uri, val_split="train", store=QUICK)
        assert open_dataset(config).split("train").samples == 60
        server.fault = Fault("403", 9, match="index.json")
        with pytest.raises(StoreError, match="access refused; check the credentials"):
            open_dataset(config)
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    local = DataConfig(source=str(tmp_path), val_split="train")
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-000001\.tar is not the object of the manifest: \d+ bytes"):
        open_dataset(local)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is in the manifest but not in the store"):
        open_dataset(local)
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json is not there, but 2 tars are; index them with"):
        open_dataset(local)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"nor any tar; make shards with"):
        open_dataset(DataConfig(source=str(tmp_path / "empty")))


def test_cache_serves_repeats_and_survives_damage(root, tmp_path):
    with FaultServer(root) as server:
        clean, _, _ = load(server)
        cache = CacheConfig(folder=str(tmp_path / "cache"), gigabytes=0.1)
        assert load(server, cache=cache)[0] == clean
        before = len([r for r in server.requests if r[1].endswith((".tar", ".idx"))])
        assert load(server, cache=cache)[0] == clean
        assert len([r for r in server.requests if r[1].endswith((".tar", ".idx"))]) == before
        for path in (tmp_path / "cache/entries").glob("*/*"):
            path.write_bytes(bytes(path.stat().st_size))  # a disk that returns zeros, for indexes too
        digest, valid, counters = load(server, cache=cache)
    assert digest == clean
    assert valid.all()
    assert counters.retries > 0
    assert counters.damaged == []


@pytest.mark.parametrize("kind", ["zeros", "404"])
def test_one_bad_read_of_an_index_damages_nothing(root, tmp_path, kind):
    """Also with a cache, which must not keep the bad bytes."""
    with FaultServer(root) as server:
        clean, _, _ = load(server)
        cache = CacheConfig(folder=str(tmp_path / "cache"), gigabytes=0.1)
        server.fault = Fault(kind, 1, match=".idx")
        for changes in ({"cache": cache}, {"cache": cache}, {}):
            digest, valid, counters = load(server, **changes)
            assert digest == clean
            assert valid.all()
            assert counters.damaged == []


def test_an_index_that_stays_wrong_is_named(root):
    with FaultServer(root) as server:
        server.fault = Fault("zeros", 100_000, match="train-000001")
        with pytest.raises(QuarantineError, match=r"its index cannot be used: .* is not the index"):
            load(server)


def test_cache_is_least_recently_used_and_bounded(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for number in range(9):
        cache.put(str(number), bytes([number]) * 100)
        os.utime(cache._path(str(number)), ns=(number, number))
    assert cache.get("0") == bytes(100)  # used: now the youngest
    cache.put("x", b"x" * 150)
    assert cache.get("0") is not None
    assert cache.get("1") is None
    assert cache.get("8") is not None
    cache.put("huge", bytes(2000))
    assert cache.get("huge") is None
    assert sum(p.stat().st_size for p in (tmp_path / "entries").glob("*/*")) <= 1000


FILL = """
import resource, signal, sys
from pathlib import Path
from orchestrator.data.cache import DiskCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = DiskCache(Path(sys.argv[1]), 10**6)
for number in range(8):
    cache.put(str(number), bytes(1000))
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))  # the kernel refuses to write more, as a full disk does
held = []
for number in range(4):
    cache.put(f"late {number}", bytes(1000))
    held.append(sum(cache.get(str(number)) is not None for number in range(8)))
print(held, cache.get("late 0"))
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
cache.put("again", b"x" * 1000)
print(len(cache.get("again")))
"""


def test_cache_gives_way_when_the_disk_takes_no_more(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["[4, 2, 1, 0] None", "1000"], done.stderr
    assert done.stderr.count("takes no more (File too large)") == 1  # said once
    left = [path for path in (tmp_path / "entries").glob("*/*") if path.is_file()]
    assert [path.stat().st_size for path in left] == [1000]


def test_a_cache_folder_that_cannot_be_made_is_one_clear_line(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        FaultServer(root) as server,
        pytest.raises(DataError, match=r"data\.cache\.folder=.*file/cache cannot be used"),
    ):
        load(server, cache=CacheConfig(folder=str(tmp_path / "file" / "cache")))


def _hammer(folder: str, number: int) -> None:
    cache = DiskCache(Path(folder), 20_000)
    for step in range(120):
        key = str((step * 7 + number) % 60)
        data = cache.get(key)
        if data is None:
            cache.put(key, key.encode().ljust(1000, b"."))
        elif data != key.encode().ljust(1000, b"."):
            raise SystemExit(3)


@pytest.mark.long
def test_cache_is_safe_for_several_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(str(tmp_path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    files = list((tmp_path / "entries").glob("*/*"))
    assert sum(path.stat().st_size for path in files) <= 20_000
    assert not [path for path in files if path.name.endswith(".partial")]


def test_object_names_cannot_leave_the_folder(tmp_path):
    store = open_store(str(tmp_path), StoreConfig())
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(StoreError, match="leaves"):
            store.read(name)
