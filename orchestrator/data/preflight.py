"""Checks a data set on the driver, before any worker starts: every failure is one clear line."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from orchestrator.data.config import DataConfig
from orchestrator.data.errors import ManifestError, NotFoundError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest, Shard, Split
from orchestrator.data.store import Store, open_store

_CHECKED = 32  # shards per split whose size and version are compared; a bucket of a million is sampled evenly


def open_dataset(config: DataConfig, splits: Iterable[str] = ()) -> Manifest:
    """Loads the manifest and compares it with what lies in the store.

    Args:
        config: source and store.
        splits: names that must exist and hold samples; empty = `train_split` and `val_split`.

    Raises:
        DataError: credentials are refused, bucket or manifest is missing, nothing is there, a split is empty, or the
            manifest describes other objects than those in the store.
    """
    manifest = Manifest.load(config.source, config.store)
    for name in dict.fromkeys(splits or (config.train_split, config.val_split)):
        check_split(manifest.split(name), config)
    return manifest


def check_split(split: Split, config: DataConfig) -> None:
    """Compares length and version of some shards, and the index of the first, with the manifest."""
    store = open_store(split.uri, config.store)
    numbers = np.unique(np.linspace(0, len(split.shards) - 1, _CHECKED).astype(int)).tolist()
    with ThreadPoolExecutor(8, thread_name_prefix="preflight") as pool:
        list(pool.map(lambda number: _check_shard(store, split.shards[number]), numbers))
    shard = split.shards[0]
    try:
        data = open_store(split.index_uri, config.store).read(shard.index)
    except NotFoundError as error:
        raise ManifestError(
            f"{split.index_uri}/{shard.index} is missing; run jobs/index_shards.py {split.uri}"
        ) from error
    ShardIndex.from_bytes(data, f"{split.index_uri}/{shard.index}")


def _check_shard(store: Store, shard: Shard) -> None:
    try:
        info = store.head(shard.name)
    except NotFoundError as error:
        raise ManifestError(
            f"{store.uri}/{shard.name} is in the manifest but not in the store; restore it, or index the shards again"
        ) from error
    if info.nbytes != shard.bytes or (shard.etag and info.etag != shard.etag):
        raise ManifestError(
            f"{store.uri}/{shard.name} is not the object of the manifest: {info.nbytes} bytes, version "
            f"{info.etag or '-'}; expected {shard.bytes}, {shard.etag or '-'}; restore it, or index the shards again"
        )
