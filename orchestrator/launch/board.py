"""A noticeboard between the driver and rank 0: progress one way, a stop request the other."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError


@dataclass(frozen=True)
class Progress:
    """What a person wants to know while a run goes on."""

    stage: str
    """ "starting", "evaluating", "training", "saving" or "finished"."""
    step: int = 0
    total: int = 0
    epoch: int = 0
    loss: float = float("nan")
    images_per_second: float = 0.0
    seconds_per_step: float = 0.0
    note: str = ""
    """A line that is worth keeping in the log, such as where a run was resumed."""


class _Board:
    """The actor's state; every method returns at once."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._notes: list[str] = []
        self._stop = ""

    def post(self, progress: Progress) -> str:
        """Takes progress, answers with the reason of a stop request ("" = go on)."""
        self._progress = progress
        if progress.note:
            self._notes.append(progress.note)
        return self._stop

    def read(self) -> tuple[Progress | None, list[str]]:
        """Latest progress and the notes since the last read."""
        notes, self._notes = self._notes, []
        return self._progress, notes

    def stop(self, reason: str) -> None:
        """Asks the run to save and end."""
        self._stop = reason


def open_board() -> Any:
    """Starts the board on the driver's node; it needs no CPU and dies with the driver."""
    return ray.remote(_Board).options(num_cpus=0).remote()


class BoardClient:
    """Rank 0's side: posts without waiting and learns of stop requests a little later.

    The step's thread only swaps a reference; a thread of its own talks to the actor, so a slow or dead driver node
    cannot hold a step.
    """

    def __init__(self, board: Any, poll_s: float = 0.5) -> None:
        self._board = board
        self._poll_s = poll_s
        self._latest = Progress("starting")
        self._notes: list[str] = []
        self.stop_reason = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)
        self._thread.start()

    def post(self, progress: Progress) -> None:
        """Replaces what the driver will see next."""
        self._latest = progress

    def note(self, text: str) -> None:
        """Queues a line for the driver's output."""
        self._notes.append(text)

    def close(self) -> None:
        """Sends what is left and ends the thread."""
        self._end.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            last = self._end.wait(self._poll_s)
            with contextlib.suppress(RayError):
                self._exchange()
            if last:
                return

    def _exchange(self) -> None:
        latest = self._latest
        for note in self._notes[:] or [""]:
            # A note leaves the queue only after the actor took it.
            reason = ray.get(self._board.post.remote(replace(latest, note=note)), timeout=10)
            if note:
                self._notes.remove(note)
            if reason:
                self.stop_reason = reason


def watch(board: Any, show: Any, done: threading.Event, poll_s: float = 0.5) -> None:
    """Driver's side: reads the board until `done`, handing (progress, notes) to `show`."""
    while not done.is_set():
        with contextlib.suppress(RayError):
            show(*ray.get(board.read.remote(), timeout=10))
        time.sleep(poll_s)
    with contextlib.suppress(RayError):
        show(*ray.get(board.read.remote(), timeout=10))
