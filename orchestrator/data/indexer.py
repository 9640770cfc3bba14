"""Gives existing tars a manifest and member indexes: streamed, parallel, resumable; and verifies whole data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import google_crc32c
import numpy as np

from orchestrator.data.config import DataConfig
from orchestrator.data.decode import IMAGE_FIELDS, LABEL_FIELDS
from orchestrator.data.errors import IntegrityError, ManifestError, NotFoundError
from orchestrator.data.fetch import SampleReader
from orchestrator.data.index import ShardIndex, scan_tar
from orchestrator.data.manifest import MANIFEST_NAME, Manifest, Shard, Split
from orchestrator.data.patterns import select, split_pattern
from orchestrator.data.progress import Progress
from orchestrator.data.quarantine import Damage
from orchestrator.data.store import Store, StoreConfig, open_store

_SPLIT_NAME = re.compile(r"(?:^|/)(train|val|validation|test)(?=[-_./0-9]|$)")
_SPLIT_WITHIN = re.compile(r"[-_.](train|val|validation|test)(?=[-_.0-9]|$)")
"""Names such as `imagenet1k-validation-00.tar`; the last such word counts."""
_VERIFIED = 256
"""Samples that are verified at once."""
_SAME = {"validation": "val"}


@dataclass(frozen=True)
class IndexReport:
    """What indexing found.

    Attributes:
        manifest: as written.
        reused: shards whose index was already there and still fits.
        incomplete: samples without image or label, per shard.
    """

    manifest: Manifest
    reused: int
    incomplete: Mapping[str, int]


def index_shards(
    source: str,
    *,
    to: str = "",
    splits: Mapping[str, str] | None = None,
    classes: tuple[str, ...] = (),
    threads: int = 8,
    store_config: StoreConfig | None = None,
) -> IndexReport:
    """Reads every tar below `source` once and writes index objects and `index.json`.

    Args:
        source: folder or prefix, optionally with a brace pattern or glob behind it.
        to: where index objects and manifest go; empty = beside the tars.
        splits: pattern of each split; empty = by "train", "val" or "test" in the names, else all is "train".
        classes: class names; empty = "0", "1", ... up to the largest label found.
        threads: shards read at the same time.
        store_config: how to reach the store.

    Raises:
        DataError: no tars, an unreadable store, a damaged tar, labels that exceed the classes.
    """
    root, pattern = split_pattern(source)
    config = store_config or StoreConfig()
    store, target = open_store(root, config), open_store(to or root, config)
    names = [info.name for info in store.list() if info.name.endswith(".tar")]
    if not names:
        raise ManifestError(f"{root}: no tars here; check the address")
    chosen = _split_names(names, pattern, splits or {}, root)
    work = [name for group in chosen.values() for name in group]
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="index") as pool,
        Progress("indexing", len(work), "tars") as bar,
    ):
        done: dict[str, tuple[Shard, ShardIndex, bool]] = {}
        for name, result in zip(work, pool.map(lambda name: _index_one(store, target, name), work), strict=True):
            done[name] = result
            bar.advance()
    top = max(index.top_label for _, index, _ in done.values())
    if classes and top >= len(classes):
        raise ManifestError(f"{root}: a label is {top}, but only {len(classes)} class names were given")
    manifest = Manifest(
        classes or tuple(str(label) for label in range(top + 1)),
        {split: tuple(done[name][0] for name in group) for split, group in chosen.items()},
        {"name": source, "indexed": True},
        shard_uri=root if to and to != root else "",
        uri=to or root,
    )
    target.write(MANIFEST_NAME, manifest.to_bytes())
    missing = {name: len(index.incomplete((IMAGE_FIELDS, LABEL_FIELDS))) for name, (_, index, _) in done.items()}
    return IndexReport(manifest, sum(old for _, _, old in done.values()), {n: c for n, c in missing.items() if c})


def _split_names(names: list[str], pattern: str, splits: Mapping[str, str], root: str) -> dict[str, list[str]]:
    try:
        if splits:
            return {split: select(names, chosen) for split, chosen in splits.items()}
        names = select(names, pattern) if pattern else names
    except LookupError as error:
        raise ManifestError(f"{root}: {error.args[0]}") from error
    groups: dict[str, list[str]] = {}
    for name in names:
        found = _SPLIT_NAME.search(name)
        within = _SPLIT_WITHIN.findall(name.rsplit("/", 1)[-1])
        word = found[1] if found else within[-1] if within else "train"
        groups.setdefault(_SAME.get(word, word), []).append(name)
    return groups


def _index_one(store: Store, target: Store, name: str) -> tuple[Shard, ShardIndex, bool]:
    """Shard entry, index, and whether the index was there already."""
    info = store.head(name)
    index_name = f"{name.removesuffix('.tar')}.idx"
    index = _usable(target, index_name, store, name, info.nbytes, info.etag)
    reused = index is not None
    if index is None:
        with store.stream(name) as stream:
            index = scan_tar(stream, f"{store.uri}/{name}", info.etag)
        if store.head(name) != info:
            raise IntegrityError(f"{store.uri}/{name} changed while it was read; index it again")
        target.write(index_name, index.to_bytes())
    crc = google_crc32c.value(index.to_bytes())
    return Shard(name, index.samples, index.nbytes, index.sha256, info.etag, index_name, crc), index, reused


def _usable(target: Store, index_name: str, store: Store, name: str, nbytes: int, etag: str) -> ShardIndex | None:
    """The index left by an earlier run, if the tar is still the one it was made from."""
    try:
        index = ShardIndex.from_bytes(target.read(index_name), index_name)
    except (NotFoundError, IntegrityError):
        return None
    if index.nbytes != nbytes or index.etag != etag:
        return None
    if not etag:  # local files carry no version mark: only their bytes can tell
        with store.stream(name) as stream:
            return index if scan_tar(stream, name).sha256 == index.sha256 else None
    return index


def verify(uri: str, *, threads: int = 8, store_config: StoreConfig | None = None) -> Iterator[Damage]:
    """Reads every shard of a data set whole and yields what is damaged, sample by sample.

    Args:
        uri: root of the manifest.
        threads: shards read at the same time.
        store_config: how to reach the store.
    """
    config = store_config or StoreConfig()
    manifest = Manifest.load(uri, config)
    work = [(name, number) for name, shards in manifest.splits.items() for number in range(len(shards))]
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool,
        Progress("verifying", len(work), "tars") as bar,
    ):
        for found in pool.map(lambda item: _verify_one(manifest.split(item[0]), item[1], config), work):
            bar.advance()
            yield from found


def _verify_one(split: Split, number: int, config: StoreConfig) -> list[Damage]:
    shard, store = split.shards[number], open_store(split.uri, config)
    first, last = int(split.starts[number]), int(split.starts[number + 1])
    try:
        with store.stream(shard.name) as stream:
            index = scan_tar(stream, shard.name)
        problem = "" if index.sha256 == shard.sha256 else "the tar's sha256 is not the manifest's"
        if not problem and not len(index.incomplete((IMAGE_FIELDS, LABEL_FIELDS))):
            return []
    except (IntegrityError, NotFoundError) as error:
        problem = str(error)
    reader = SampleReader(split, DataConfig(source=split.uri, store=config))
    found: list[Damage] = []
    for low in range(first, last, _VERIFIED):  # not the whole shard in memory
        entries = reader.read(np.arange(low, min(low + _VERIFIED, last))).values()
        found += [entry for entry in entries if isinstance(entry, Damage)]
    return found or [Damage(-1, f"{split.uri}/{shard.name}", 0, f"{problem}; no sample is affected")]


def parse_classes(text: str) -> tuple[str, ...]:
    """Class names from a file's text, one per line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
