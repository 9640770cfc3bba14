"""Loaders side by side: the same images in the same real object store, taking turns in one run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds

from orchestrator.data.benchmark.contestants import CONTESTANTS
from orchestrator.data.errors import StoreError
from orchestrator.data.indexer import index_shards
from orchestrator.data.store import StoreConfig, open_store

_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def seaweed() -> Iterator[tuple[str, str]]:
    """A SeaweedFS of our own with authentication; gives its S3 endpoint and its plain http address of the bucket."""
    binary = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    s3, filer, *others = _ports(6)
    with tempfile.TemporaryDirectory() as folder:
        names = zip(("master.port", "volume.port", "admin.port", "webdav.port"), others, strict=True)
        command = [binary, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket", "bench"]
        command += [f"-s3.port={s3}", f"-filer.port={filer}", *(f"-{name}={port}" for name, port in names)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=folder, env=os.environ | _KEYS, **quiet)  # type: ignore[call-overload]  # noqa: S603
        try:
            _wait(f"http://127.0.0.1:{s3}")
            yield f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{filer}/buckets/bench"
        finally:
            process.kill()
            process.wait()


def _ports(count: int) -> list[int]:
    """Free ports whose sum with 10,000 is a port too: SeaweedFS puts its internal services there."""
    found: list[int] = []
    for port in random.sample(range(12_000, 30_000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")


def _wait(endpoint: str) -> None:
    store = open_store("s3://bench", StoreConfig(endpoint=endpoint, retries=1))
    for _ in range(120):
        try:
            store.write("ready", b"1")
        except StoreError:
            time.sleep(0.5)
        else:
            return
    raise StoreError(f"SeaweedFS at {endpoint} did not answer within 60 s")


def prepare(images: Path, repeat: int, endpoint: str, http: str) -> dict[str, Any]:
    """Uploads the tars `repeat` times under different names and indexes them; returns the contestants' settings."""
    store = open_store("s3://bench/tars", StoreConfig(endpoint=endpoint))
    tars = sorted(images.glob("*.tar"))
    names = []
    for copy in range(repeat):
        for tar in tars:
            names.append(f"train-{copy}-{tar.name}")
            store.write(names[-1], tar.read_bytes())
    report = index_shards("s3://bench/tars", store_config=StoreConfig(endpoint=endpoint))
    warm = next(iter(wds.WebDataset(str(tars[0]), shardshuffle=False)))["jpg"]
    return {
        "endpoint": endpoint,
        "s3": "s3://bench/tars",
        "mds": "s3://bench/mds",
        "names": names,
        "http": [f"{http}/tars/{name}" for name in names],
        "samples": sum(shard.samples for shard in report.manifest.splits["train"]),
        "warm": warm.decode("latin-1"),
    }


_WRITE_MDS = """
import json, sys, webdataset as wds
from streaming import MDSWriter
settings = json.loads(sys.stdin.read())
with MDSWriter(out=settings["mds"], columns={"jpg": "bytes", "cls": "str"}, size_limit=1 << 24) as out:
    for sample in wds.WebDataset(settings["http"], shardshuffle=False):
        out.write({"jpg": sample["jpg"], "cls": sample["cls"].decode()})
"""


def measure(images: Path, repeat: int, rounds: int, only: list[str], python: str) -> list[dict[str, object]]:
    """One row per contestant, the median of its rounds.

    Args:
        images: folder of plain WebDataset tars with JPEG photographs.
        repeat: copies of each tar in the bucket.
        rounds: turns of each contestant.
        only: contestants; empty = all.
        python: interpreter of an environment with mosaicml-streaming and torchdata; empty = this one.
    """
    os.environ.update(_KEYS | {"OMP_NUM_THREADS": "1"})
    found: dict[str, list[dict[str, float]]] = {}
    with seaweed() as (endpoint, http):
        settings = prepare(images, repeat, endpoint, http)
        os.environ["S3_ENDPOINT_URL"] = endpoint
        names = [name for name in CONTESTANTS if not only or name in only]
        if "streaming" in names:
            _run([python or sys.executable, "-c", _WRITE_MDS], settings, "streaming's own format")
        for turn in range(rounds):
            for name in random.Random(turn).sample(names, len(names)):  # so that no two are always neighbours
                interpreter = python if python and name in ("streaming", "torchdata") else sys.executable
                command = [interpreter, "-m", "orchestrator.data.benchmark.contestants", name]
                result = _run(command, settings, name)
                if result:
                    found.setdefault(name, []).append(json.loads(result.splitlines()[-1]))
    return [_row(name, runs) for name, runs in found.items()]


def _run(command: list[str], settings: dict[str, Any], what: str) -> str:
    done = subprocess.run(command, input=json.dumps(settings), capture_output=True, text=True, timeout=600)  # noqa: S603
    if done.returncode:
        print(f"{what}: not measured: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return ""
    return done.stdout


def _row(name: str, runs: list[dict[str, float]]) -> dict[str, object]:
    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    return {
        "loader": name,
        "images_per_second": round(middle([r["images"] / r["wall"] for r in runs]), 1),
        "cpu_seconds_per_1000": round(middle([1000 * r["cpu"] / r["images"] for r in runs]), 2),
        "first_batch_seconds": round(middle([r["first"] for r in runs]), 2),
        "resume_at_80_percent_seconds": round(middle([r["resume"] for r in runs]), 2),
    }
