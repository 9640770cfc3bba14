"""Batches for one rank: the pieces of its readers (a thread, or worker processes) joined in slot order.

A rank's part of a batch is cut again into one contiguous part per worker process, so a process reads only the streams
of its own slots. Nothing here keeps a position: the caller says where to begin.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Split
from orchestrator.data.order import Order, SampleOrder, SequentialOrder
from orchestrator.data.parts import LoaderCounters, Part, ReaderSpec, read_parts
from orchestrator.data.views import EvalView, TrainView


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
