"""Batches for one rank: a pure order, read ahead, verified, decoded and cut out, in threads or worker processes.

A rank's part of a batch is cut again into one contiguous part per worker process, so a process reads only the streams
of its own slots; the parts are joined in slot order. Nothing here keeps a position: the caller says where to begin.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.decode import decode_rgb
from orchestrator.data.errors import DataError, IntegrityError
from orchestrator.data.fetch import Encoded, Prefetcher, SampleReader
from orchestrator.data.manifest import Split
from orchestrator.data.order import Order, SampleOrder, SequentialOrder, part
from orchestrator.data.quarantine import Damage, Quarantine
from orchestrator.data.views import EvalView, TrainView, render


@dataclass(frozen=True)
class Batch:
    """This rank's contiguous part of one global batch.

    Attributes:
        images: uint8 [b, 3, S, S]; a hole is black.
        ids: int64 [b], sample ids in slot order.
        labels: int64 [b]; -1 in a hole.
        valid: bool [b], False for a quarantined sample: give it no weight.
        epoch: 0-based.
        index: number of the global batch in the epoch.
        first: slot of the first sample in the global batch.
        own: this rank's part; when pairs are asked for, up to one sample on either side belongs to a neighbour.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    valid: Tensor
    epoch: int
    index: int
    first: int = 0
    own: slice = field(default_factory=lambda: slice(None))


@dataclass
class LoaderCounters:
    """What loading has done so far; seconds are summed over threads and processes except `wait_seconds`."""

    samples: int = 0
    bytes: int = 0
    requests: int = 0
    retries: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    total_seconds: float = 0.0
    damaged: list[Damage] = field(default_factory=list)

    @property
    def wait_fraction(self) -> float:
        """Share of the time between batches that the caller spent waiting for data."""
        return self.wait_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def quarantined(self) -> list[int]:
        """Ids of the samples found damaged here."""
        return [damage.id for damage in self.damaged]


@dataclass(frozen=True)
class ReaderSpec:
    """All that one reader (a rank's thread or worker process) needs; plain data, sent to worker processes."""

    config: DataConfig
    split: Split
    order: Order
    view: TrainView | EvalView
    seed: int
    epoch: int
    first_batch: int
    stop_batch: int
    global_batch: int
    rank: int
    world: int
    quarantined: tuple[int, ...]
    pairs: bool = False
    worker: int = 0
    workers: int = 1

    def of_rank(self, index: int) -> tuple[int, int]:
        """Slots of batch `index` that are this rank's own."""
        return part(self.order.batch_size(index, self.global_batch), self.world, self.rank)

    def at_hand(self, index: int) -> tuple[int, int]:
        """Slots of batch `index` that this rank reads: its own, and the partners of those at its edges."""
        low, high = self.of_rank(index)
        if not self.pairs or low == high:
            return low, high
        return low - low % 2, min(high + high % 2, self.order.batch_size(index, self.global_batch))

    def owned(self, index: int) -> tuple[int, int]:
        """Slots of batch `index` that this reader serves."""
        low, high = self.at_hand(index)
        first, last = part(high - low, self.workers, self.worker)
        return low + first, low + last


@dataclass
class Part:
    """One reader's piece of a batch, with the counters of the time since its last piece."""

    images: Tensor
    ids: Tensor
    labels: Tensor
    valid: Tensor
    index: int
    counters: LoaderCounters


def read_parts(spec: ReaderSpec, closed: threading.Event | None = None) -> Iterator[Part]:
    """The reader's pieces of batches `first_batch` to `stop_batch`, in order.

    Args:
        spec: what to read.
        closed: set by whoever has no use for more, which also ends a wait for a store that is away.
    """
    reader = SampleReader(spec.split, spec.config, closed)
    quarantine = Quarantine(spec.config.quarantine_budget, spec.quarantined)
    stored = sum(shard.bytes for shard in spec.split.shards)
    prefetcher = Prefetcher(
        reader,
        spec.order,
        spec.config,
        samples=spec.split.samples,
        mean_bytes=stored / spec.split.samples,
        epoch=spec.epoch,
        global_batch=spec.global_batch,
        stop_batch=spec.stop_batch,
        owned=spec.owned,
        skip=quarantine.__contains__,
    )
    counted = replace(reader.counters)
    try:
        for index in range(spec.first_batch, spec.stop_batch):
            began = time.perf_counter()
            ids, encoded = prefetcher.take(index)
            fetched = time.perf_counter()
            piece = _decode_part(spec, index, ids, encoded, quarantine)
            now = replace(reader.counters)
            piece.counters = LoaderCounters(
                samples=len(ids),
                bytes=now.bytes - counted.bytes,
                requests=now.requests - counted.requests,
                retries=now.retries - counted.retries,
                read_seconds=fetched - began,
                decode_seconds=time.perf_counter() - fetched,
                damaged=quarantine.found[:],
            )
            quarantine.found.clear()
            counted = now
            yield piece
    finally:
        prefetcher.close()


def _decode_part(
    spec: ReaderSpec, index: int, ids: np.ndarray, encoded: list[Encoded | Damage | None], quarantine: Quarantine
) -> Part:
    size = spec.view.image_size
    images = torch.empty((len(ids), 3, size, size), dtype=torch.uint8)
    labels = torch.full((len(ids),), -1, dtype=torch.int64)
    valid = torch.ones(len(ids), dtype=torch.bool)
    draws = spec.view.draws(spec.seed, spec.epoch, ids)
    for slot, sample in enumerate(encoded):
        if isinstance(sample, Encoded):
            try:
                pixels = decode_rgb(sample.data, sample.field, spec.config.max_pixels)
                render(pixels, spec.view.box(pixels.shape[0], pixels.shape[1], draws[slot]), images[slot])
                spec.view.finish(images[slot], draws[slot])
                labels[slot] = sample.label
                continue
            except IntegrityError as error:
                sample = _damage(spec.split, int(ids[slot]), sample.offset, str(error))
        if sample is not None:
            quarantine.add(sample)
        images[slot] = 0
        valid[slot] = False
    return Part(images, torch.from_numpy(ids), labels, valid, index, LoaderCounters())


def _damage(split: Split, sample_id: int, offset: int, reason: str) -> Damage:
    shard, _ = split.locate(np.array([sample_id]))
    return Damage(sample_id, f"{split.uri}/{split.shards[int(shard[0])].name}", offset, reason)


class Loader:
    """Iterator of `Batch`; a context manager that ends its thread or processes."""

    def __init__(self, spec: ReaderSpec, source: Callable[[ReaderSpec], Iterable[Part]], pieces: int) -> None:
        self._spec, self._pieces = spec, pieces
        self.counters = LoaderCounters()
        self._parts = iter(source(spec))
        self._next = spec.first_batch
        self._last = time.perf_counter()

    def __len__(self) -> int:
        """Batches that are left."""
        return self._spec.stop_batch - self._next

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next >= self._spec.stop_batch:
            raise StopIteration
        began = time.perf_counter()
        parts = [next(self._parts) for _ in range(self._pieces)]
        batch = _join(parts, self._spec, self._next)
        self._next += 1
        self._count(parts, began)
        return batch

    def _count(self, parts: list[Part], began: float) -> None:
        now, total = time.perf_counter(), self.counters
        total.wait_seconds += now - began
        total.total_seconds += now - self._last
        self._last = now
        for piece in parts:
            total.samples += piece.counters.samples
            total.bytes += piece.counters.bytes
            total.requests += piece.counters.requests
            total.retries += piece.counters.retries
            total.read_seconds += piece.counters.read_seconds
            total.decode_seconds += piece.counters.decode_seconds
            total.damaged += piece.counters.damaged

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread or the worker processes and waits for them."""
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()
        self._next = self._spec.stop_batch


def _join(parts: list[Part], spec: ReaderSpec, index: int) -> Batch:
    assert all(piece.index == index for piece in parts), "pieces of different batches"  # noqa: S101 - invariant
    if len(parts) == 1:
        only = parts[0]
        images, ids, labels, valid = only.images, only.ids, only.labels, only.valid
    else:
        images, ids, labels, valid = (
            torch.cat([getattr(piece, name) for piece in parts]) for name in ("images", "ids", "labels", "valid")
        )
    if torch.cuda.is_available():  # page-locked, so that the copy to the device runs beside the step
        images = images.pin_memory()
    first, (low, high) = spec.at_hand(index)[0], spec.of_rank(index)
    return Batch(images, ids, labels, valid, spec.epoch, index, first, slice(low - first, high - first))


class _ThreadSource:
    """Runs `read_parts` in one background thread, `prefetch` batches ahead."""

    def __init__(self, spec: ReaderSpec) -> None:
        self._queue: queue.Queue[Part | BaseException | None] = queue.Queue(maxsize=spec.config.prefetch)
        self._stopped = threading.Event()
        self._unwanted = threading.Event()  # not the same: reading ends by itself too, and then there is a word to pass on
        self._thread = threading.Thread(target=self._run, args=(spec,), name="data-loader", daemon=True)
        self._thread.start()

    def _run(self, spec: ReaderSpec) -> None:
        end: BaseException | None = None
        parts = read_parts(spec, self._unwanted)
        try:
            for piece in parts:
                if not self._put(piece):
                    break
        except Exception as error:
            end = error
        finally:
            parts.close()  # type: ignore[attr-defined]
        self._put(end)

    def _put(self, item: Part | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> _ThreadSource:
        return self

    def __next__(self) -> Part:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._stopped.set()
            raise item
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread; returns when it has ended."""
        self._stopped.set()
        self._unwanted.set()
        self._thread.join()


def open_loader(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    epoch: int,
    first_batch: int,
    global_batch: int,
    rank: int,
    world: int,
    view: TrainView | EvalView,
    stop_batch: int | None = None,
    quarantined: Iterable[int] = (),
    pairs: bool = False,
) -> Loader:
    """Opens the stream of this rank's batches.

    Args:
        config: how to read and shuffle.
        split: which samples.
        seed: of the run; with the epoch it decides order and crops.
        epoch: 0-based.
        first_batch: where to begin; reading starts right there.
        global_batch: samples per step over all ranks.
        rank: this rank.
        world: number of ranks; any number, the batches stay the same lists.
        view: `TrainView` for the shuffled order, `EvalView` for the manifest's order.
        stop_batch: first batch that is not wanted; None = to the end of the epoch.
        quarantined: ids of known holes (from the saved state).
        pairs: also read the partners of this rank's slots, where slots 2i and 2i+1 are a pair.

    Returns:
        A context manager and iterator of `Batch`.

    Raises:
        DataError: the split is smaller than one batch, or the numbers do not fit together.
    """
    if not 0 <= rank < world or global_batch < 1 or first_batch < 0:
        raise DataError(f"rank {rank} of {world}, global batch {global_batch}, first batch {first_batch}: do not fit")
    order = make_order(config, split, seed, view)
    batches = order.batches_per_epoch(global_batch)
    if not batches:
        raise DataError(
            f"{split.uri}, split {split.name!r}: {split.samples} samples fill no global batch of {global_batch}; "
            "lower train.global_batch or set data.last_batch=short"
        )
    stop = batches if stop_batch is None else min(stop_batch, batches)
    spec = ReaderSpec(
        config, split, order, view, seed, epoch, first_batch, max(stop, first_batch), global_batch, rank, world,
        tuple(quarantined), pairs,
    )  # fmt: skip
    if config.workers == 0:
        return Loader(spec, _ThreadSource, 1)
    from orchestrator.data.workers import ProcessSource

    return Loader(spec, ProcessSource, config.workers)


def make_order(config: DataConfig, split: Split, seed: int, view: TrainView | EvalView) -> Order:
    """The order that a view of a split implies."""
    if isinstance(view, EvalView):
        return SequentialOrder(min(view.samples or split.samples, split.samples), split.samples)
    return SampleOrder(split.samples, seed, config.streams, config.run, config.block_runs, config.last_batch)
