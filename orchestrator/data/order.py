"""The order of samples: a pure function of (seed, epoch, position), the same for every number of workers.

Words used here. A *run* is `run` consecutive samples of the manifest, read with one request. A *block* is `block_runs`
runs from random places, whose samples are shuffled together. The blocks of an epoch, one after another, are the
*master sequence*: a permutation of the split. It is cut into `streams` equal stretches, and every global batch takes an
equal share of each stream: slot j of a batch always belongs to the same stream. Readers own slots, so a reader touches
only the blocks of its streams, and batch k is the same list of ids for every number of readers.

Nothing is stored: a shuffle of 10**10 samples costs what one reader touches. Positions map to samples by arithmetic and
two keyed permutations (`permute`), and samples map back to positions (`slots`), which tells a reader what it will need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from itpn_core.errors import ConfigError
from orchestrator.data.permute import I64, permute, unpermute


class Order(Protocol):
    """Which samples make up global batch `index` of an epoch."""

    def batches_per_epoch(self, global_batch: int) -> int:
        """Number of global batches."""

    def batch_size(self, index: int, global_batch: int) -> int:
        """Samples in batch `index`; less than `global_batch` only in a short last batch."""

    def batch(self, epoch: int, index: int, global_batch: int, low: int = 0, high: int | None = None) -> I64:
        """Sample ids of slots [low, high) of batch `index`; int64."""

    def slots(self, epoch: int, ids_B: I64, global_batch: int) -> tuple[I64, I64]:
        """Batch index and slot of each id; a dropped id has the batch index `batches_per_epoch`."""


def part(size: int, parts: int, number: int) -> tuple[int, int]:
    """Contiguous part `number` of `size` slots cut into `parts`; sizes differ by at most one."""
    return size * number // parts, size * (number + 1) // parts


def _stream_of_slot(slots: I64, global_batch: int, streams: int) -> tuple[I64, I64]:
    """First slot and number of slots of each slot's stream; stream s begins at s * global_batch // streams."""
    stream = ((slots + 1) * streams - 1) // global_batch
    start = stream * global_batch // streams
    return start, (stream + 1) * global_batch // streams - start


@lru_cache(maxsize=64)
def _place_of_last_run(runs: int, seed: int, epoch: int) -> int:
    return int(unpermute(np.array([runs - 1], dtype=np.int64), runs, seed=seed, epoch=epoch, name="order/runs")[0])


@dataclass(frozen=True)
class SequentialOrder:
    """Manifest order, short last batch: for evaluation.

    Attributes:
        samples: how many samples, at equal distances over the split (so that shards sorted by class give all classes).
        of: size of the split; 0 = `samples`.
    """

    samples: int
    of: int = 0

    def batches_per_epoch(self, global_batch: int) -> int:
        """As `Order.batches_per_epoch`."""
        return -(-self.samples // global_batch)

    def batch_size(self, index: int, global_batch: int) -> int:
        """As `Order.batch_size`."""
        return max(0, min(global_batch, self.samples - index * global_batch))

    def batch(self, epoch: int, index: int, global_batch: int, low: int = 0, high: int | None = None) -> I64:
        """As `Order.batch`; the epoch does not matter."""
        size = self.batch_size(index, global_batch)
        start = index * global_batch
        place = np.arange(start + min(low, size), start + (size if high is None else min(high, size)), dtype=np.int64)
        return place * (self.of or self.samples) // self.samples

    def slots(self, epoch: int, ids_B: I64, global_batch: int) -> tuple[I64, I64]:
        """As `Order.slots`; an id that is not among the samples counts as dropped."""
        of = self.of or self.samples
        place = (ids_B * self.samples + of - 1) // of
        chosen = place * of // self.samples == ids_B
        return np.where(chosen, place // global_batch, self.batches_per_epoch(global_batch)), place % global_batch


@dataclass(frozen=True)
class SampleOrder:
    """Shuffled order of one split; see the module's text.

    Attributes:
        samples: size of the split.
        seed: of the run.
        streams: logical streams; a batch smaller than that has as many streams as slots.
        run: consecutive samples read together.
        block_runs: runs shuffled together.
        last: "drop" leaves out the samples that fill no batch (others in each epoch), "short" makes a last short batch.
    """

    samples: int
    seed: int
    streams: int = 16
    run: int = 32
    block_runs: int = 16
    last: str = "drop"

    def __post_init__(self) -> None:
        if min(self.samples, self.streams, self.run, self.block_runs) < 1:
            raise ValueError(f"{self}: samples, streams, run and block_runs must be at least 1")
        if self.last not in ("drop", "short"):
            raise ConfigError("data.last_batch", self.last, "allowed are 'drop' and 'short'")

    def batches_per_epoch(self, global_batch: int) -> int:
        """As `Order.batches_per_epoch`."""
        full = self.samples // global_batch
        return full + (1 if self.last == "short" and self.samples % global_batch else 0)

    def batch_size(self, index: int, global_batch: int) -> int:
        """As `Order.batch_size`."""
        return max(0, min(global_batch, self.samples - index * global_batch))

    def batch(self, epoch: int, index: int, global_batch: int, low: int = 0, high: int | None = None) -> I64:
        """As `Order.batch`.

        Raises:
            IndexError: the epoch has no batch `index`.
        """
        if not 0 <= index < self.batches_per_epoch(global_batch):
            raise IndexError(f"batch {index} of {self.batches_per_epoch(global_batch)}")
        size = self.batch_size(index, global_batch)
        slots = np.arange(min(low, size), size if high is None else min(high, size), dtype=np.int64)
        return self._ids(epoch, self._master_of_slot(index, slots, global_batch))

    def dropped(self, epoch: int, global_batch: int) -> I64:
        """Ids that no batch of this epoch holds (none with last="short")."""
        if self.last == "short":
            return np.empty(0, dtype=np.int64)
        return self._ids(epoch, np.arange(self.samples // global_batch * global_batch, self.samples, dtype=np.int64))

    def slots(self, epoch: int, ids_B: I64, global_batch: int) -> tuple[I64, I64]:
        """As `Order.slots`."""
        full = self.samples // global_batch
        master = self._master_of_id(epoch, ids_B)
        if not full:
            return np.zeros_like(master), master
        streams = min(self.streams, global_batch)
        tail = master >= full * global_batch
        # A stream that owns the slots [start, start + share) owns the stretch [full * start, full * (start + share)).
        start, share = _stream_of_slot(np.minimum(master // full, global_batch - 1), global_batch, streams)
        inside = master - full * start
        batch = np.where(tail, full, inside // share)
        return batch, np.where(tail, master - full * global_batch, start + inside % share)

    def _master_of_slot(self, index: int, slots: I64, global_batch: int) -> I64:
        full = self.samples // global_batch
        if index >= full:
            return full * global_batch + slots
        start, share = _stream_of_slot(slots, global_batch, min(self.streams, global_batch))
        return full * start + index * share + (slots - start)

    # The master sequence. All runs have `run` samples but the last, which may be shorter by `deficit`; wherever the
    # shuffle puts it, everything behind it moves forward by that much.

    @property
    def _runs(self) -> int:
        return -(-self.samples // self.run)

    @property
    def _deficit(self) -> int:
        return self._runs * self.run - self.samples

    def _short_place(self, epoch: int) -> int:
        return _place_of_last_run(self._runs, self.seed, epoch)

    def _start_of_place(self, place: I64, short: int) -> I64:
        """Master position at which the run at `place` begins."""
        return np.minimum(place, self._runs) * self.run - np.where(place > short, self._deficit, 0)

    def _block_bounds(self, block: I64, short: int) -> tuple[I64, I64]:
        start = self._start_of_place(block * self.block_runs, short)
        return start, self._start_of_place((block + 1) * self.block_runs, short)

    def _ids(self, epoch: int, master: I64) -> I64:
        short = self._short_place(epoch)
        full_block = self.block_runs * self.run
        behind = master >= self._block_bounds(np.asarray(short // self.block_runs), short)[1]
        block = np.where(behind, master + self._deficit, master) // full_block
        block = np.where(behind, block, np.minimum(block, short // self.block_runs))
        start, end = self._block_bounds(block, short)
        inner = permute(master - start, end - start, seed=self.seed, epoch=epoch, name="order/block", tweak_B=block)
        flat = start + inner
        behind = flat >= self._start_of_place(np.asarray(short + 1), short)
        place = np.where(behind, flat + self._deficit, flat) // self.run
        run = permute(place, self._runs, seed=self.seed, epoch=epoch, name="order/runs")
        return run * self.run + flat - self._start_of_place(place, short)

    def _master_of_id(self, epoch: int, ids: I64) -> I64:
        short = self._short_place(epoch)
        place = unpermute(ids // self.run, self._runs, seed=self.seed, epoch=epoch, name="order/runs")
        flat = self._start_of_place(place, short) + ids % self.run
        block = place // self.block_runs
        start, end = self._block_bounds(block, short)
        return start + unpermute(
            flat - start, end - start, seed=self.seed, epoch=epoch, name="order/block", tweak_B=block
        )
