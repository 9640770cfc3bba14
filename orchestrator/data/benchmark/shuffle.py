"""How well a shuffle mixes: distance between neighbours in the source, and runs of one class."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import webdataset.filters as wds_filters

from orchestrator.data.order import SampleOrder
from orchestrator.data.permute import I64

CLASSES = 100


def quality(ids: I64, samples: int) -> dict[str, object]:
    """Figures of one shuffle.

    Args:
        ids: the order of the samples.
        samples: size of the source, taken to be sorted by 100 classes.

    Returns:
        distance: mean distance of consecutive samples in the source, over a third of its length (1 = perfect).
        class_run: mean length of runs of one class (1.01 = perfect).
        classes_in_256: different classes among 256 consecutive samples (92.4 = perfect).
    """
    labels = ids * CLASSES // samples
    runs = 1 + int((np.diff(labels) != 0).sum())
    distinct = [len(np.unique(labels[start : start + 256])) for start in range(0, len(ids) - 255, 256)]
    return {
        "distance": float(np.abs(np.diff(ids)).mean() / (samples / 3)),
        "class_run": len(ids) / runs,
        "classes_in_256": float(np.mean(distinct)),
    }


def ours(shards: int, per_shard: int) -> I64:
    """Our default order in batches of 256."""
    order = SampleOrder(shards * per_shard, seed=0)
    return np.concatenate([order.batch(0, k, 256) for k in range(order.batches_per_epoch(256))])


def webdataset(shards: int, per_shard: int, buffer: int) -> I64:
    """WebDataset's shard shuffle followed by its sample shuffle with a buffer."""
    rng = random.Random(0)
    names = list(range(shards))
    rng.shuffle(names)

    def source() -> Iterator[int]:
        for name in names:
            yield from range(name * per_shard, (name + 1) * per_shard)

    shuffled = wds_filters._shuffle(source(), bufsize=buffer, initial=buffer, rng=rng)
    return np.fromiter(shuffled, dtype=np.int64)


def streaming(algorithm: str, shards: int, per_shard: int) -> I64 | None:
    """MosaicML Streaming's shuffle of the same shards, where that package is installed."""
    try:
        get_shuffle = importlib.import_module("streaming.base.shuffle").get_shuffle
    except ImportError:
        return None
    sizes = np.full(shards, per_shard)
    result: I64 = get_shuffle(algorithm, sizes, 1, 0, 0, 1 << 18)
    return result


def measure(shards: int, per_shard: int) -> list[dict[str, object]]:
    """One row per shuffle."""
    makers: dict[str, Callable[[], I64 | None]] = {
        "none (source order)": lambda: np.arange(shards * per_shard),
        "ours": lambda: ours(shards, per_shard),
        "WebDataset, buffer 1,000": lambda: webdataset(shards, per_shard, 1000),
        "WebDataset, buffer 10,000": lambda: webdataset(shards, per_shard, 10_000),
        "Streaming py1e": lambda: streaming("py1e", shards, per_shard),
        "Streaming py1br": lambda: streaming("py1br", shards, per_shard),
        "perfect": lambda: np.random.default_rng(0).permutation(shards * per_shard),
    }
    rows: list[dict[str, object]] = []
    for name, make in makers.items():
        ids = make()
        if ids is not None:
            rows.append({"shuffle": name, **quality(ids, shards * per_shard)})
    return rows
