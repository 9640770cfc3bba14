"""One reader's pieces of the batches: read ahead, verified, decoded and cut out.

A reader is a rank's background thread or one of its worker processes. Nothing here keeps a position: the caller says
where to begin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.decode import decode_rgb
from orchestrator.data.errors import IntegrityError
from orchestrator.data.fetch import Encoded, Prefetcher, SampleReader
from orchestrator.data.manifest import Split
from orchestrator.data.order import Order, part
from orchestrator.data.quarantine import Damage, Quarantine
from orchestrator.data.views import EvalView, TrainView, render


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
