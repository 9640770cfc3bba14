"""The driver's list of evaluations beside the training: one runs, few wait, none holds what the training needs.

Who runs them is behind `Runner`; Ray's is `orchestrator.launch.evaluations`. An evaluation that raises or takes too
long has failed; one whose process is gone is started again, and lost after `TRIES`; one whose place the training wants
back is stopped and waits again. Whatever comes of it is a `Result` on run storage, and rank 0 is told.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from orchestrator.checkpoint.config import CheckpointConfig
from orchestrator.data.folder import Folder, StorageError
from orchestrator.train.apart import Measured
from orchestrator.train.results import DONE, FAILED, LOST, SKIPPED, Request, Result, keep, kept
from orchestrator.train.state import is_better

TRIES = 3
WAITING = 2
"""Evaluations that may wait behind the one that runs: their checkpoints stay on storage until they are measured."""


class GoneError(Exception):
    """An evaluation ended without a word of its own: another try may succeed."""


class Runner(Protocol):
    """Where evaluations run; every method returns at once."""

    def room(self) -> bool:
        """Whether one could run now on what nobody else has or waits for."""

    def claimed(self) -> bool:
        """Whether the training waits for something that an evaluation may hold."""

    def start(self, request: Request, colours: Any) -> Any:
        """Starts one; returns what the other methods know it by."""

    def poll(self, task: Any) -> Measured | None:
        """What it brought, None while it runs. Raises `GoneError`, or what it raised."""

    def stop(self, task: Any) -> None:
        """Ends it by force."""


class Desk:
    """Takes requests from rank 0 and sees to it that each comes to an end. `look` is called again and again.

    Args:
        runner: where evaluations run.
        folder: the run's.
        limit_s: how long one may take. It counts from the start on: there was room then, and what waits all the same,
            because another job took that room, waits no longer than this either.
        checkpoint: which metric is the best.
        tell: hands a result to rank 0.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: Runner,
        folder: Folder,
        limit_s: float,
        checkpoint: CheckpointConfig,
        tell: Callable[[Result], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._folder, self._limit_s, self._tell = runner, folder, limit_s, tell
        self._checkpoint, self._clock = checkpoint, clock
        self._lock, self._settling = threading.Lock(), threading.Lock()
        self._waiting: list[Request] = []
        self._running: Request | None = None
        self._task: Any = None
        self._began = 0.0
        self._tries: dict[int, int] = {}
        self._spent: dict[int, float] = {}
        self._unkept: list[Result] = []
        self._untold: list[Result] = []
        self._best: float | None = None
        self._colours: Any = None
        self._known: set[int] = set()
        self.yielded = 0
        """How often an evaluation gave its place back to the training."""

    def ask(self, request: Request) -> None:
        """Takes a request; one that is known already (a new worker group asks again) changes nothing."""
        with self._lock:
            if request.step in self._known:
                return
            self._known.add(request.step)
            self._waiting.append(request)
            # The first evaluation has the baselines; any other is worth less than a newer one.
            spare = [waiting for waiting in self._waiting if waiting.step > 0]
            if len(self._waiting) > WAITING + (self._running is None) and spare:
                self._waiting.remove(spare[0])
                why = f"evaluations take longer than their interval: step {request.step} asked before it had its turn"
                self._end(Result(spare[0].step, SKIPPED, error=why))

    def look(self) -> None:
        """Follows the one that runs, starts the next where there is room, and tells what has ended."""
        try:
            with self._lock:
                if self._running is not None:
                    self._follow(self._running)
                if self._running is None and self._waiting and self._runner.room():
                    self._start(self._waiting[0])
        finally:
            self._settle()

    def close(self) -> list[int]:
        """Ends what runs; returns the steps that were asked for and have no result."""
        with self._lock:
            left = [request.step for request in ([self._running] if self._running else []) + self._waiting]
            if self._running is not None:
                self._runner.stop(self._task)
            self._running, self._waiting = None, []
        self._settle()
        with contextlib.suppress(StorageError):  # rank 0 may have given some up as lost
            ended = {result.step for result in kept(self._folder, left)}
            left = [step for step in left if step not in ended]
        return left

    def _start(self, request: Request) -> None:
        values = [value for value in (request.best, self._best) if value is not None]
        best = (max if self._checkpoint.best_mode == "max" else min)(values) if values else None
        self._task = self._runner.start(replace(request, best=best), self._colours)
        self._running, self._began = request, self._clock()
        self._waiting.remove(request)

    def _follow(self, request: Request) -> None:
        took = self._clock() - self._began
        try:
            measured = self._runner.poll(self._task)
        except GoneError as error:
            self._again(request, str(error), took)
        except Exception:  # whatever it raised is its result
            self._end(Result(request.step, FAILED, error=traceback.format_exc(), seconds=took))
        else:
            if measured is not None:
                self._colours = measured.colours
                self._end(measured.result)
            elif took > self._limit_s:
                self._runner.stop(self._task)
                why = f"it took longer than train.guard.evaluate_s={self._limit_s:g}"
                self._end(Result(request.step, FAILED, error=why, seconds=took))
            elif self._runner.claimed():
                self._runner.stop(self._task)
                self.yielded += 1
                self._put_back(request, took)

    def _again(self, request: Request, why: str, took: float) -> None:
        self._tries[request.step] = self._tries.get(request.step, 0) + 1
        if self._tries[request.step] < TRIES:
            self._put_back(request, took)
            return
        spent = self._spent.get(request.step, 0.0) + took
        self._end(Result(request.step, LOST, error=f"{why} ({TRIES} tries)", seconds=spent))

    def _put_back(self, request: Request, took: float) -> None:
        self._spent[request.step] = self._spent.get(request.step, 0.0) + took
        self._running = None
        self._waiting.insert(0, request)

    def _end(self, result: Result) -> None:
        """The lock is held."""
        if self._running is not None and self._running.step == result.step:
            self._running = None
        name, mode = self._checkpoint.best_metric, self._checkpoint.best_mode
        if result.state == DONE and name in result.metrics and is_better(result.metrics[name], self._best, mode):
            self._best = result.metrics[name]
        self._unkept.append(result)
        self._untold.append(result)

    def _settle(self) -> None:
        """Keeps what has ended, then tells of it. `ask` does not wait for storage: its lock is free meanwhile."""
        with self._settling:
            untold = len(self._untold)  # what ends from now on is kept first too
            with contextlib.suppress(StorageError):  # the next look tries again
                while self._unkept:
                    keep(self._folder, self._unkept[0])
                    self._unkept.pop(0)
            for _ in range(untold):
                self._tell(self._untold[0])
                self._untold.pop(0)
