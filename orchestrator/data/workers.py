"""Worker processes of the loader: torch's DataLoader as transport (shared memory, dead workers noticed, no zombies).

Processes come from a fork server that was started fresh, never by forking the training process: that one holds threads,
a CUDA context and Ray's sockets. The fork server keeps the environment of its own first start, so each worker is given
today's: credentials may have been set or renewed since.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from orchestrator.data.errors import DataError
from orchestrator.data.parts import Part, ReaderSpec, read_parts


class _Parts(IterableDataset[Part | DataError]):
    """In worker w of n: part w of n of this rank's part of every batch."""

    def __init__(self, spec: ReaderSpec) -> None:
        self._spec = spec
        self._environment = dict(os.environ)

    def __iter__(self) -> Iterator[Part | DataError]:
        info = get_worker_info()
        if info is None:
            raise RuntimeError("this data set is only for worker processes")
        os.environ.clear()
        os.environ.update(self._environment)
        try:
            yield from read_parts(replace(self._spec, worker=info.id, workers=info.num_workers))
        except DataError as error:  # sent as it is: DataLoader would bury the one clear line in a worker's traceback
            yield error


def _same(piece: Any) -> Any:
    return piece


class ProcessSource:
    """Pieces of all workers in turn: w0, w1, ..., w0, ... for batch after batch."""

    def __init__(self, spec: ReaderSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["orchestrator.data.parts"])
        with warnings.catch_warnings():
            # Decoders may outnumber the cores that this process was given: on purpose, when the store is slow.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader = DataLoader(
                _Parts(spec),
                batch_size=None,
                num_workers=spec.config.workers,
                collate_fn=_same,
                prefetch_factor=spec.config.prefetch,
                multiprocessing_context=context,
            )
            self._iterator: Any = iter(loader)

    def __iter__(self) -> ProcessSource:
        return self

    def __next__(self) -> Part:
        piece: Part | DataError = next(self._iterator)
        if isinstance(piece, DataError):
            raise piece
        return piece

    def close(self) -> None:
        """Ends the worker processes; returns when they have ended."""
        self._iterator = None  # its finaliser stops and joins them
        gc.collect(0)
