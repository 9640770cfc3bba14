"""A noticeboard between the driver and the workers: progress and failures one way, requests and verdicts the other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.launch.background import Rounds
from orchestrator.launch.failure import Complaint, backoff_seconds, first_failure
from orchestrator.train.context import CLOSING
from orchestrator.train.results import Request, Result


@dataclass(frozen=True)
class Progress:
    """What a person wants to know while a run goes on."""

    stage: str
    """ "starting", "evaluating", "training", "saving", "finished", "closing" or "refused"."""
    step: int = 0
    total: int = 0
    epoch: int = 0
    loss: float = float("nan")
    images_per_second: float = 0.0
    seconds_per_step: float = 0.0


@dataclass(frozen=True)
class News:
    """What rank 0 tells at once."""

    progress: Progress | None
    notes: list[str] = field(default_factory=list)
    """Lines that are worth keeping in the log, such as where a run was resumed."""
    states: list[tuple[str, str]] = field(default_factory=list)
    """Lifecycle states that were entered, with their reasons."""
    requests: list[Request] = field(default_factory=list)
    """Checkpoints that are to be measured beside the training."""


@dataclass(frozen=True)
class Admission:
    """What a worker is told when it starts."""

    wait_s: float = 0.0
    """Pause before it does anything, after failures that brought no progress."""
    refusal: str = ""
    """Why no worker group can help any more; "" = go on."""
    exit_code: int = 0
    open_s: float = field(default=0.0, compare=False)
    """For how long the driver has been starting groups: no process has been there for this run for longer."""


class Group(NamedTuple):
    """What the board knows of the worker group."""

    running: bool
    """Whether one has begun and not failed."""
    silent_s: float
    """For how many seconds none was heard."""
    refused_s: float
    """How many seconds ago a rank refused to go on; 0 = none has."""
    closing: bool
    """Whether rank 0 is bringing what it has onto storage after an error."""


class Told(NamedTuple):
    """How much of the board's news the driver has."""

    notes: int = 0
    states: int = 0
    requests: int = 0

    def plus(self, news: News) -> Told:
        """With this news."""
        return Told(self.notes + len(news.notes), self.states + len(news.states), self.requests + len(news.requests))


NOTHING = Told()


class Board:
    """The actor's state; every method returns at once."""

    def __init__(self, max_failures: int = 0) -> None:
        self._max_failures = max_failures
        self._progress: Progress | None = None
        self._notes: list[str] = []
        self._states: list[tuple[str, str]] = []
        self._requests: list[Request] = []
        self._results: list[Result] = []
        self._stop = ""
        self._complaints: list[Complaint] = []
        self._failures = self._idle = 0
        self._furthest = -1
        self._verdict = Admission()
        self._refused_at = 0.0
        self._cause = ""
        self._counted = False
        """Whether the failure of the group that runs now is counted; the controller may tell of it more than once."""
        self._running = False
        self._opened = self._heard = time.monotonic()

    def post(self, news: News) -> str:
        """Takes news, answers with the reason of a stop request ("" = go on)."""
        self._heard = time.monotonic()
        self._progress = news.progress or self._progress
        self._notes += news.notes
        self._states += news.states
        self._requests += news.requests
        return self._stop

    def evaluated(self, result: Result) -> None:
        """Called by the driver with what came of a request."""
        self._results.append(result)

    def results(self, known: int) -> list[Result]:
        """What came of requests, without the first `known`."""
        return self._results[known:]

    def read(self, known: Told = NOTHING) -> News:
        """Latest progress, and what has been told, without what the driver has: an answer may get lost."""
        return News(
            self._progress, self._notes[known.notes :], self._states[known.states :], self._requests[known.requests :]
        )

    def stop(self, reason: str) -> None:
        """Asks the run to save and end."""
        self._stop = reason

    def admit(self) -> Admission:
        """Called by every worker when it starts."""
        self._counted = False
        self._running, self._heard = True, time.monotonic()
        # After progress since the last failure this start has another reason.
        again = self._step() <= self._furthest or self._verdict.refusal
        return replace(self._verdict if again else Admission(), open_s=self._heard - self._opened)

    def _step(self) -> int:
        return self._progress.step if self._progress else 0

    def complain(self, complaint: Complaint) -> None:
        """Called by a rank that fails, before anybody else can notice: the order of arrival is that of failing."""
        self._complaints.append(complaint)

    def refuse(self, reason: str, exit_code: int) -> None:
        """Ends the run: groups that start from now on do nothing. The first refusal stays."""
        if not self._verdict.refusal:
            self._verdict = Admission(refusal=reason, exit_code=exit_code)
            self._refused_at = time.monotonic()

    def failed(self, errors: dict[int, str]) -> None:
        """Called by Ray Train's controller when ranks have failed: the group ends, and may start again."""
        if self._counted:
            return
        self._counted, self._running = True, False
        self._cause = first_failure(errors, self._complaints)
        self._complaints = []
        self._failures += 1
        step = self._step()
        self._idle = 0 if step > self._furthest else self._idle + 1
        self._furthest = max(self._furthest, step)
        if self._verdict.refusal or self._failures > self._max_failures:
            return
        wait = backoff_seconds(self._idle)
        self._verdict = Admission(wait)
        pause = f", in {wait:g} s" if wait else ""
        self._notes.append(
            f"warning: {self._cause}\nthe worker group starts again from the last checkpoint{pause} "
            f"(failure {self._failures} of at most {self._max_failures})"
        )

    def group(self) -> Group:
        """How the worker group is."""
        now = time.monotonic()
        refused_s = now - self._refused_at if self._verdict.refusal else 0.0
        closing = self._progress is not None and self._progress.stage == CLOSING
        return Group(self._running, now - self._heard, refused_s, closing)

    def end(self) -> tuple[str, Admission]:
        """Which failure came first in the group that failed last, and the verdict."""
        return self._cause, self._verdict


def open_board(max_failures: int = 0) -> Any:
    """Starts the board on the driver's node; it needs no CPU and dies with the driver.

    Left to Ray, an actor without CPUs may land on any node, and the run would lose its board with a worker's host.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote(max_failures)


class BoardClient:
    """Rank 0's side: posts without waiting and learns of stop requests a little later.

    The step's thread only swaps a reference; a thread of its own talks to the actor, so a slow or dead driver node
    cannot hold a step.
    """

    def __init__(self, board: Any, poll_s: float = 0.5) -> None:
        self._board = board
        self._poll_s = poll_s
        self._latest: Progress | None = None
        self._notes: list[str] = []
        self._states: list[tuple[str, str]] = []
        self._requests: list[Request] = []
        self._results: list[Result] = []
        self._asked = False
        self._known = 0
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

    def state(self, name: str, reason: str = "") -> None:
        """Queues a lifecycle state for the run's record."""
        self._states.append((name, reason))

    def ask(self, request: Request) -> None:
        """Queues a checkpoint that is to be measured."""
        self._asked = True
        self._requests.append(request)

    def evaluated(self) -> list[Result]:
        """What came of requests since the last call."""
        count = len(self._results)
        found = self._results[:count]
        del self._results[:count]
        return found

    def close(self) -> None:
        """Sends what is left and ends the thread."""
        self._end.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        rounds = Rounds("the line to the driver")
        while True:
            last = self._end.wait(self._poll_s)
            with rounds.one(), contextlib.suppress(RayError):
                self._exchange()
            if last:
                return

    def _exchange(self) -> None:
        news = News(self._latest, self._notes[:], self._states[:], self._requests[:])
        reason = ray.get(self._board.post.remote(news), timeout=10)
        # They leave the queue only after the actor took them.
        del self._notes[: len(news.notes)], self._states[: len(news.states)], self._requests[: len(news.requests)]
        if reason:
            self.stop_reason = reason
        if self._asked:
            new = ray.get(self._board.results.remote(self._known), timeout=10)
            self._known += len(new)
            self._results += new


def watch(
    board: Any, takers: Sequence[Callable[[News], None]], done: threading.Event, poll_s: float = 0.5
) -> None:  # fmt: skip
    """Driver's side: reads the board until `done`, and once more.

    Args:
        board: the noticeboard.
        takers: each is handed all news in turn; what one of them raises keeps them from no other.
        done: ends it.
        poll_s: pause between two looks.
    """
    rounds, known, last = Rounds("the watch of the noticeboard"), NOTHING, False
    while not last:
        last = done.wait(poll_s)
        with rounds.one(), contextlib.suppress(RayError):
            news: News = ray.get(board.read.remote(known), timeout=10)
            known = known.plus(news)
            for take in takers:
                with rounds.one():
                    take(news)
