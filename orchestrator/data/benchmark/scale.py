"""The order of a very large data set, walked by one of very many readers."""

from __future__ import annotations

import hashlib
import resource
import time

import numpy as np
import psutil

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.order import SampleOrder, part


def measure(shards: int, per_shard: int, readers: int, per_reader_batch: int, batches: int) -> dict[str, object]:
    """Time and memory of one reader's walk through the first `batches` batches, with resumes at random places.

    The reader also asks for the positions of every run it opens, as the loader does to plan its reads.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    order = SampleOrder(shards * per_shard, seed=0, streams=readers)
    global_batch = readers * per_reader_batch
    total = order.batches_per_epoch(global_batch)
    built = time.perf_counter() - began
    reader = readers // 3
    low, high = part(global_batch, readers, reader)
    runs: set[int] = set()
    samples = 0
    began = time.perf_counter()
    for index in range(min(batches, total)):
        ids = order.batch(0, index, global_batch, low, high)
        fresh = np.setdiff1d(np.unique(ids // order.run), np.fromiter(runs, np.int64, len(runs)))
        if len(fresh):
            order.slots(0, (fresh[:, None] * order.run + np.arange(order.run)).ravel(), global_batch)
            runs = set((ids // order.run).tolist()) | set(fresh.tolist()) | set(list(runs)[-1024:])
        samples += len(ids)
    walked = time.perf_counter() - began
    began = time.perf_counter()
    for index in np.linspace(0, total - 1, 100).astype(int).tolist():
        order.batch(0, index, global_batch, low, high)
    seek = (time.perf_counter() - began) / 100
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": shards * per_shard,
        "readers": readers,
        "batches_per_epoch": total,
        "seconds_to_build": round(built, 6),
        "microseconds_per_sample": round(1e6 * walked / samples, 2),
        "seconds_for_the_readers_epoch": round(walked / samples * total * per_reader_batch, 1),
        "milliseconds_to_seek": round(1e3 * seek, 3),
        "mebibytes_more": round((after - before) / 1024, 1),
    }


def manifest(shards: int) -> dict[str, object]:
    """What reading the manifest of so many shards costs a process; each process that trains reads it once, whole."""
    digest = hashlib.sha256(b"shard").hexdigest()
    made = [
        Shard(f"train-{n:07d}.tar", 10**4, 1_100_000_000, digest, f'"{n:032x}-128"', f"train-{n:07d}.idx", n)
        for n in range(shards)
    ]
    text = Manifest(("class",), {"train": tuple(made)}).to_bytes()
    made.clear()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    split = Manifest.parse(text, "s3://bucket/prefix").split("train")
    seconds = time.perf_counter() - began
    return {
        "shards": len(split.shards),
        "megabytes_of_json": round(len(text) / 1e6, 1),
        "seconds_to_parse": round(seconds, 2),
        "mebibytes_held": round((process.memory_info().rss - before) / (1 << 20)),
    }
