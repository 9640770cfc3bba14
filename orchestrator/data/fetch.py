"""Reads the encoded samples of one reader ahead of their use: whole runs with one request, each sample exactly once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import google_crc32c
import numpy as np

from orchestrator.data.cache import CachedStore, open_cached
from orchestrator.data.config import DataConfig
from orchestrator.data.decode import IMAGE_FIELDS, LABEL_FIELDS
from orchestrator.data.errors import (
    ChangedError,
    DataError,
    DataGoneError,
    IntegrityError,
    NotFoundError,
    ShortReadError,
    StoreError,
)
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Shard, Split
from orchestrator.data.order import Order
from orchestrator.data.permute import I64
from orchestrator.data.quarantine import Damage
from orchestrator.data.store import open_store

T = TypeVar("T")
log = logging.getLogger(__name__)
_GAP = 64 << 10  # bytes that are cheaper to read and throw away than to ask for separately
_ATTEMPTS = 3
_INDEXES = 256  # shard indexes kept open per reader
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Encoded:
    """One sample as stored, verified: image bytes, their extension, the label, where the sample lies in its tar."""

    field: str
    data: bytes
    label: int
    offset: int


@dataclass
class ReadCounters:
    """What reading has cost so far."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0


class SampleReader:
    """Fetches samples by id; thread-safe."""

    def __init__(self, split: Split, config: DataConfig, closed: threading.Event | None = None) -> None:
        self._split, self._config = split, config
        self._store, self._index_store = self._open()
        self._indexes: dict[int, ShardIndex] = {}
        self._lock = threading.Lock()
        self._closed = closed or threading.Event()
        """Once it is set, no read waits for the store to come back."""
        self.counters = ReadCounters()

    def close(self) -> None:
        """Ends reads that wait for the store to come back."""
        self._closed.set()

    def _open(self) -> tuple[CachedStore, CachedStore]:
        """New clients for the shards and for their indexes; credentials are taken from the environment's chain."""
        split, config = self._split, self._config
        store = open_cached(open_store(split.uri, config.store), config.cache)
        if split.index_uri == split.uri:
            return store, store
        return store, open_cached(open_store(split.index_uri, config.store), config.cache)

    def _patiently(self, read: Callable[[], T]) -> T:
        """Tries again while the store is away or refuses, with a new client each time.

        Raises:
            DataGoneError: it stayed so for `data.store.give_up_s`.
            StoreError: the store answers, but what was asked for is not there or not right.
        """
        limit, pause, began = self._config.store.give_up_s, _FIRST_PAUSE_S, time.monotonic()
        while True:
            try:
                return read()
            except (NotFoundError, ShortReadError, ChangedError):
                raise
            except StoreError as error:
                left = limit - (time.monotonic() - began)
                if left <= 0:
                    raise DataGoneError(
                        f"training data could not be read for {limit:g} s (data.store.give_up_s), the last time: {error}. "
                        "Committed checkpoints are intact: repair the access and type the same command again"
                    ) from error
                log.warning("reading waits for the store, %.0f s are left: %s", left, error)
                if self._closed.wait(min(pause, left)):
                    raise
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            with self._lock:
                self.counters.retries += 1
                self._store, self._index_store = self._open()

    def read(self, ids_B: I64) -> dict[int, Encoded | Damage]:
        """Reads samples that lie close together.

        Args:
            ids_B: sample ids, sorted.

        Returns:
            For each id its verified bytes, or what is wrong with it.

        Raises:
            DataGoneError: the store cannot be reached, or refuses, for too long. Damage is not raised: it is returned.
        """
        result: dict[int, Encoded | Damage] = {}
        shard_B, number_B = self._split.locate(ids_B)
        for shard_number in np.unique(shard_B).tolist():
            mine = shard_B == shard_number
            ids, numbers = ids_B[mine].tolist(), number_B[mine].tolist()
            shard = self._split.shards[shard_number]
            try:
                index = self._index(shard_number)
            except (IntegrityError, ShortReadError, ChangedError, NotFoundError) as error:
                result |= {i: Damage(i, shard.name, 0, f"its index cannot be used: {error}") for i in ids}
                continue
            for group in _groups(index, numbers):
                result |= self._read_group(shard, index, [(ids[g], numbers[g]) for g in group])
        return result

    def _index(self, shard_number: int) -> ShardIndex:
        with self._lock:
            if shard_number in self._indexes:
                self._indexes[shard_number] = self._indexes.pop(shard_number)  # now the youngest
                return self._indexes[shard_number]
        shard = self._split.shards[shard_number]
        where = f"{self._split.index_uri}/{shard.index}"
        index = ShardIndex.from_bytes(self._index_bytes(shard, where), where)
        if (index.samples, index.nbytes, index.sha256) != (shard.samples, shard.bytes, shard.sha256):
            raise IntegrityError(f"{where} describes another shard than {shard.name}; run jobs/index_shards.py")
        with self._lock:
            self._indexes[shard_number] = index
            if len(self._indexes) > _INDEXES:
                self._indexes.pop(next(iter(self._indexes)))
        return index

    def _index_bytes(self, shard: Shard, where: str) -> bytes:
        """The stored index; bytes that came wrong, or lie wrong in the cache, are asked for again."""
        content = f"{shard.index_crc32c:08x}-{shard.sha256}"
        wrong = IntegrityError(f"{where} is not the index the manifest was written with; run jobs/index_shards.py")
        error: DataError = wrong
        for attempt in range(_ATTEMPTS):
            with self._lock:
                self.counters.retries += attempt > 0
            try:
                data = self._patiently(partial(self._read_index, shard.index, content, attempt > 0))
                if google_crc32c.value(data) == shard.index_crc32c:
                    return data
                error = wrong
            except (ShortReadError, ChangedError, NotFoundError) as missing:
                error = missing
        raise error

    def _read_index(self, name: str, content: str, fresh: bool) -> bytes:
        return self._index_store.read(name, content=content, fresh=fresh)  # the client may have been renewed

    def _read_group(self, shard: Shard, index: ShardIndex, group: list[tuple[int, int]]) -> dict[int, Encoded | Damage]:
        """One request for neighbouring samples; those that came wrong are asked for again one by one."""
        result: dict[int, Encoded | Damage] = {}
        start, end = _extent(index, group[0][1])[0], _extent(index, group[-1][1])[1]
        try:
            data = self._range(shard, start, end)
        except (ShortReadError, ChangedError, NotFoundError, IntegrityError):
            data = None
        for sample_id, number in group:
            try:
                if data is None:
                    raise IntegrityError("the range could not be read")
                result[sample_id] = self._verified(index, number, data, start)
            except IntegrityError:
                result[sample_id] = self._read_again(shard, index, sample_id, number)
        return result

    def _range(self, shard: Shard, start: int, end: int, fresh: bool = False) -> bytes | memoryview:
        if end > shard.bytes:
            raise IntegrityError(f"{shard.name}: the index points to offset {end}, the shard has {shard.bytes} bytes")
        with self._lock:
            self.counters.requests += 1
            self.counters.bytes += end - start
        return self._patiently(
            lambda: self._store.read_range(
                shard.name, start, end - start, shard.etag, content=shard.sha256, fresh=fresh
            )
        )

    def _read_again(self, shard: Shard, index: ShardIndex, sample_id: int, number: int) -> Encoded | Damage:
        start, end = _extent(index, number)
        reason = ""
        for _ in range(_ATTEMPTS - 1):
            with self._lock:
                self.counters.retries += 1
            try:
                return self._verified(index, number, self._range(shard, start, end, fresh=True), start)
            except (ShortReadError, ChangedError, NotFoundError, IntegrityError) as error:
                reason = str(error)
        return Damage(sample_id, f"{self._split.uri}/{shard.name}", start, reason)

    def _verified(self, index: ShardIndex, number: int, data: bytes | memoryview, base: int) -> Encoded:
        """One sample out of the bytes of a request; every member checked before anyone decodes it."""
        image, field, label = b"", "", None
        for offset, length, crc, _, code, _ in index.rows(number).tolist():
            name = index.fields[code]
            if name not in IMAGE_FIELDS and name not in LABEL_FIELDS:
                continue
            if length > self._config.max_member_mb << 20:
                raise IntegrityError(f"member .{name} has {length} bytes; data.max_member_mb allows fewer")
            member = bytes(data[offset - base : offset - base + length])
            if len(member) != length or google_crc32c.value(member) != crc:
                raise IntegrityError(f"member .{name} at offset {offset}: its bytes are not the ones that were written")
            if name in LABEL_FIELDS:
                label = self._label(member)
            else:
                image, field = member, name
        if not field or label is None:
            raise IntegrityError(f"the sample has no {'image' if not field else 'cls'} member")
        return Encoded(field, image, label, _extent(index, number)[0])

    def _label(self, member: bytes) -> int:
        try:
            label = int(member)
        except ValueError as error:
            raise IntegrityError(f"its label {member[:20]!r} is no number") from error
        if not 0 <= label < max(len(self._split.classes), 1) and self._split.classes:
            raise IntegrityError(f"its label {label} is not one of {len(self._split.classes)} classes")
        return label


def _extent(index: ShardIndex, number: int) -> tuple[int, int]:
    """First and last byte of a sample's members."""
    rows = index.rows(number)
    return int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["length"][-1])


def _groups(index: ShardIndex, numbers: list[int]) -> list[list[int]]:
    """Positions in `numbers` that are read with one request each."""
    groups: list[list[int]] = []
    end = -1
    for position, number in enumerate(numbers):
        start = int(index.members["offset"][index.first[number]])
        if groups and start - end <= _GAP:
            groups[-1].append(position)
        else:
            groups.append([position])
        end = _extent(index, number)[1]
    return groups


class Prefetcher:
    """Keeps the reads of the next batches under way, within a memory budget, and hands batches out in order."""

    def __init__(
        self,
        reader: SampleReader,
        order: Order,
        config: DataConfig,
        *,
        samples: int,
        mean_bytes: float,
        epoch: int,
        global_batch: int,
        stop_batch: int,
        owned: Callable[[int], tuple[int, int]],
        skip: Callable[[int], bool],
    ) -> None:
        """Prepares; reads nothing.

        Args:
            reader: reads samples.
            order: of the epoch.
            config: runs, prefetch and memory.
            samples: size of the split.
            mean_bytes: of one stored sample, for the memory budget.
            epoch: 0-based.
            global_batch: samples per step over all ranks.
            stop_batch: first batch that is not wanted.
            owned: slots [low, high) of a batch that this reader serves.
            skip: whether an id is a known hole.
        """
        self._reader, self._order, self._config = reader, order, config
        self._samples, self._mean_bytes = samples, mean_bytes
        self._epoch, self._global_batch, self._stop = epoch, global_batch, stop_batch
        self._owned, self._skip = owned, skip
        self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="data-read")
        self._coming: dict[int, Future[dict[int, Encoded | Damage]]] = {}
        self._ids: dict[int, I64] = {}
        self._first: int | None = None

    def close(self) -> None:
        """Drops what is under way."""
        self._reader.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, index: int) -> tuple[I64, list[Encoded | Damage | None]]:
        """The reader's samples of batch `index` in slot order; None marks a known hole."""
        first = index not in self._ids
        if first:
            self._plan(index)  # nothing else is under way until this batch is there
        else:
            self._plan_ahead(index)
        ids = self._ids.pop(index)
        out: list[Encoded | Damage | None] = []
        for sample_id in ids.tolist():
            future = self._coming.pop(sample_id, None)
            out.append(None if future is None else future.result().pop(sample_id))
        if first:
            self._plan_ahead(index)
        return ids, out

    def _plan_ahead(self, index: int) -> None:
        for ahead in range(index + 1, min(self._stop, index + 1 + self._config.prefetch)):
            if ahead not in self._ids:
                self._plan(ahead)

    def _plan(self, index: int) -> None:
        """Starts the reads that batch `index` still lacks; each read brings all that this reader needs of the run."""
        low, high = self._owned(index)
        ids = self._order.batch(self._epoch, index, self._global_batch, low, high)
        self._ids[index] = ids
        missing = np.array([i for i in ids.tolist() if i not in self._coming and not self._skip(i)], dtype=np.int64)
        if not len(missing):
            return
        fresh = np.unique(missing // self._config.run)
        whole = fresh[: self._room(index)]
        due = missing[~np.isin(missing // self._config.run, whole)]
        wanted = np.sort(np.concatenate([self._needed(whole, index), due]))
        runs = wanted // self._config.run
        for begin, end in zip(*_bounds(runs), strict=True):
            chunk = wanted[begin:end]
            future = self._pool.submit(self._reader.read, chunk)
            self._coming.update(dict.fromkeys(chunk.tolist(), future))

    def _room(self, index: int) -> int:
        """How many whole runs may be read for a batch; of the others only the samples that are due.

        None for the first batch, so that it does not wait for a block of every stream, and none beyond the memory
        budget: what is left out then is read later, when it is due.
        """
        if self._first is None:
            self._first = index
        if index == self._first:
            return 0
        held = len(self._coming) * self._mean_bytes
        return max(0, int(((self._config.memory_mb << 20) - held) / (self._mean_bytes * self._config.run)))

    def _needed(self, runs: I64, index: int) -> I64:
        """Ids of whole runs that this reader will serve in batch `index` or later and does not hold yet; sorted."""
        size = self._config.run
        ids = (runs[:, None] * size + np.arange(size)).ravel()
        ids = ids[ids < self._samples]
        batch, slot = self._order.slots(self._epoch, ids, self._global_batch)
        low, high = self._owned(index)
        keep = (batch >= index) & (batch < self._stop) & (slot >= low) & (slot < high)
        tail = self._order.batches_per_epoch(self._global_batch) - 1
        if tail < self._stop and self._owned(tail) != (low, high):  # a short last batch is cut at other slots
            low, high = self._owned(tail)
            keep = np.where(batch == tail, (slot >= low) & (slot < high), keep)
        ids = ids[keep]
        return np.array([i for i in ids.tolist() if i not in self._coming and not self._skip(i)], dtype=np.int64)


def _bounds(runs: I64) -> tuple[list[int], list[int]]:
    """Begin and end of each stretch of equal values."""
    begin = np.flatnonzero(np.diff(runs, prepend=-1)).tolist()
    return begin, [*begin[1:], len(runs)]
