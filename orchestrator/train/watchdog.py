"""Notices that a rank gets nowhere, writes down where all stand, and ends the rank so that its group starts anew.

A thread per rank looks at the stopwatch of `orchestrator.train.ledger`: as long as spans come and go, the rank lives. A
rank that hangs in a collective call cannot be woken from Python, so the thread ends the process; the launcher sees a
dead worker, counts it against the retry budget and starts the group again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from orchestrator.data.folder import StorageError
from orchestrator.train import hangs
from orchestrator.train.config import GuardConfig
from orchestrator.train.context import RunContext
from orchestrator.train.ledger import Stopwatch
from orchestrator.train.outside import LOOK_S, here

EXIT_HUNG = 75
GRACE_S = 5.0
TELL_S = 2.0
TELLING_S = 60.0
"""A rank that cannot bring its report onto storage within so long ends without."""


@dataclass
class Position:
    """Where this rank is; written by the training thread, read by the watchdog's."""

    step: int = -1
    """The last step that was finished; -1 before the first."""
    samples: tuple[int, ...] = ()
    """Ids of the last samples that were taken up."""
    collective: str = "none yet"
    collectives: int = 0
    """Collective calls entered so far: the rank with the fewest is the one the others wait for."""


class Watchdog:
    """Watches one rank from `start` until `close`.

    Args:
        config: limits; `hang_s=0` watches nothing.
        run: surroundings of this rank.
        watch: the stopwatch whose spans are the signs of life.
        end: ends the process with an exit code.
        patience_s: how long some rank may wait for its data while the others wait for it.
    """

    def __init__(
        self,
        config: GuardConfig,
        run: RunContext,
        watch: Stopwatch,
        end: Callable[[int], object] = os._exit,
        patience_s: float = 0.0,
    ) -> None:
        self._patience_s = patience_s
        self._ending = False
        self.position = Position()
        self._config = config
        self._run = run
        self._watch = watch
        self._end = end
        self._incident = "starting"
        self._places = [here()]
        self._durations: deque[float] = deque(maxlen=101)
        self._stepped_at = 0.0
        self._trainer = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch; the calling thread is the one that trains."""
        self._trainer = threading.get_ident()
        if self._config.hang_s > 0:
            self._thread.start()

    def begin(self) -> None:
        """Agrees on a name for what may happen, and tells of a hang that ended the attempt before. Collective."""
        name = [f"{self._run.attempt:04d}-{time.time_ns() // 10**6}"]
        if self._run.world > 1:
            self.collective("name of this start")
            dist.broadcast_object_list(name)
            places = [here()] * self._run.world
            dist.all_gather_object(places, here())
            self._places = places
        self._incident = name[0]
        if self._run.rank == 0:
            for text in hangs.untold(self._run.folder):
                self._run.note(text)

    def take_up(self, samples: list[int]) -> None:
        """The training thread has taken up these samples."""
        self.position.samples = tuple(samples)

    def stepped(self, step: int) -> None:
        """The training thread has finished a step."""
        now = time.monotonic()
        if self.position.step >= 0:
            self._durations.append(now - self._stepped_at)
        self.position.step, self._stepped_at = step, now

    def collective(self, name: str) -> None:
        """The training thread is about to enter a call that waits for the other ranks."""
        self.position.collective = name
        self.position.collectives += 1

    def end(self) -> None:
        """No step follows: what is left is to bring everything onto storage."""
        self._ending = True

    def limit(self, phase: str) -> float:
        """Seconds that one span of a class may last."""
        config = self._config
        first = self.position.step < 0
        own = {"compile": config.compile_s, "evaluation": config.evaluate_s, "compute": config.compile_s * first}
        # A common save only copies; at the end a rank waits for storage, and for the ranks that write.
        if phase == "restart" or self._ending:
            return config.restore_s
        median = statistics.median(self._durations) if self._durations else 0.0
        return max(own.get(phase, 0.0), config.hang_s, 10 * median, self._patience_s)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        seen, since = self._watch.changes, time.monotonic()
        while not self._closed.wait(min(1.0, self._config.hang_s / 5)):
            now = time.monotonic()
            if self._watch.changes != seen:
                seen, since = self._watch.changes, now
            elif now - since > self.limit(self._watch.current):
                self._hung(now - since)
                return

    def _hung(self, quiet: float) -> None:
        phase = self._watch.current
        report = hangs.Report(
            rank=self._run.rank, world=self._run.world, phase=phase or "no measured phase", quiet_s=round(quiet, 1),
            limit_s=round(self.limit(phase), 1), step=self.position.step, samples=list(self.position.samples),
            collective=self.position.collective, collectives=self.position.collectives, thread=self._trainer,
            stacks=_stacks(),
        )  # fmt: skip
        # On a thread of its own: the storage that it writes to may be what hangs.
        telling = threading.Thread(target=self._tell, args=(report,), name="hang report", daemon=True)
        telling.start()
        telling.join(TELLING_S)
        self._end(EXIT_HUNG)

    def _tell(self, report: hangs.Report) -> None:
        folder, incident, world = self._run.folder, self._incident, self._run.world
        grace = time.monotonic() + GRACE_S
        try:
            hangs.write(folder, incident, report)
            hangs.wait_for_all(folder, incident, world, grace)
            if len(self._places) == world:  # else the group hangs before it knew its places
                hangs.write_for_silent(folder, incident, self._places, self._run.rank)
            hangs.wait_for_all(folder, incident, world, grace + LOOK_S)
            if self._run.rank == 0:
                self._run.note(hangs.tell(folder, incident))
                time.sleep(TELL_S)  # a thread of the launcher carries it to the driver
                hangs.mark_told(folder, incident)
            else:
                time.sleep(2 * TELL_S)  # the first dead rank ends all; rank 0 has something to say before
        except StorageError as error:
            self._run.note(f"a rank hangs and storage does not take its stacks ({error})\n{report.stacks}")


def _stacks() -> str:
    """The Python stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
