"""Keeps one rank's stopwatch and, through the window's all-reduce, the ledger of the whole run."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch._dynamo.callback import CallbackArgs, callback_handler

from orchestrator.data.folder import StorageError
from orchestrator.train.context import RunContext
from orchestrator.train.ledger import CLASSES, KEY, Ledger, Stopwatch, Trace, resumed

FIELDS = (*CLASSES, "elapsed")
REMOTE_EVERY_S = 5.0
"""Seconds between two traces on an object store, where every one is a request."""


class Goodput:
    """Measures this rank's spans; on rank 0 it also leaves the run's ledger on storage once per window.

    Args:
        run: surroundings of this rank; begins to count here, as restart until the caller leaves that span.
    """

    def __init__(self, run: RunContext) -> None:
        self.watch = Stopwatch()
        self.watch.enter("restart")
        self.ledger = Ledger()
        self._run = run
        self._begun_at = time.time()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger") if run.rank == 0 else None
        self._pending: Future[bool] | None = None
        self._left_at = 0.0

    def start(self) -> None:
        """Lets the compiler tell when it is at work; `close` ends that."""
        callback_handler.register_start_callback(self._compile_starts)
        callback_handler.register_end_callback(self._compile_ends)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Counts the time of a block as one of `CLASSES`."""
        return self.watch.span(name)

    def _compile_starts(self, _: CallbackArgs) -> None:
        self.watch.enter("compile")

    def _compile_ends(self, _: CallbackArgs) -> None:
        self.watch.leave()

    def resume(self, saved: Ledger, step: int) -> None:
        """Takes up the ledger of the checkpoint that was loaded, corrected by what the attempt before did after it."""
        trace = self._last_trace() if self._run.rank == 0 else None
        self.ledger = resumed(saved, step, trace, self._begun_at, self._begun_at - self._run.began_at, self._run.world)

    def _last_trace(self) -> Trace | None:
        try:
            return Trace.loads(self._run.folder.get(KEY))
        except FileNotFoundError:
            return None
        except (StorageError, json.JSONDecodeError, KeyError, TypeError) as error:
            self._run.note(f"warning: the goodput ledger of the attempt before cannot be read ({error})")
            return None

    def sums(self) -> list[float]:
        """This rank's seconds since the last call, to be summed over ranks and given to `take`."""
        taken = self.watch.take()
        return [taken[name] for name in FIELDS]

    def take(self, sums: list[float], step: int, *, ended: bool = False) -> None:
        """Adds the sums over all ranks, and leaves a trace for the next attempt."""
        self.ledger.add(dict(zip(FIELDS, sums, strict=True)))
        if self._pool is None:
            return
        local = self._run.folder.local_path() is not None
        early = not local and time.time() - self._left_at < REMOTE_EVERY_S
        if not ended and (early or (self._pending and not self._pending.done())):
            return  # a slow store loses a trace, never a step
        self._left_at = time.time()
        trace = Trace(Ledger.from_json(self.ledger.to_json()), step, time.time(), self._run.world, ended)
        self._pending = self._pool.submit(self._leave, trace)

    def _leave(self, trace: Trace) -> bool:
        try:
            return self._run.folder.put(KEY, trace.dumps())
        except StorageError:
            return False  # checkpoints report the trouble with storage

    def end(self, step: int, *, ended: bool = False) -> None:
        """Adds what no window carried, on all ranks; `ended` as in `Trace`. Collective."""
        sums = torch.tensor(self.sums(), dtype=torch.float64, device=self._run.device)
        if self._run.world > 1:
            dist.all_reduce(sums)
        self.take(sums.tolist(), step, ended=ended)

    def metrics(self) -> dict[str, float]:
        """Shares of the rank-seconds so far, by class."""
        shares = {f"goodput/share/{name}": value for name, value in self.ledger.fractions().items()}
        return {**shares, "goodput/restarts": float(self.ledger.restarts)}

    def close(self) -> None:
        """Writes the last trace and lets go of the compiler's hooks."""
        callback_handler.remove_start_callback(self._compile_starts)
        callback_handler.remove_end_callback(self._compile_ends)
        if self._pool is not None:
            self._pool.shutdown()
