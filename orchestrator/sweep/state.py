"""Which trial runs next, what becomes of one that failed, and when a sweep is over: decisions without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from itpn_core.errors import UserError
from orchestrator.data.errors import DataError, StorageGoneError
from orchestrator.sweep.journal import End, TrialJournal
from orchestrator.sweep.known import FAILED, INFEASIBLE, RUNNING, Sampler, Trial
from orchestrator.sweep.queue import Queue, resting_rungs
from orchestrator.sweep.space import Space

Measure = Callable[[Trial], End | None]
"""Runs one trial to its end, or to where it rests (None); raises when it cannot."""


class OutOfMemory(Exception):  # noqa: N818 -- an outcome of a trial, not a mistake
    """A trial needs more memory than its device or host has."""


class TimedOut(Exception):  # noqa: N818 -- as above
    """A trial took longer than it may."""


class SweepState:
    """One driver's view of a sweep, rebuilt from its journal.

    Args:
        journal: the sweep's trials.
        space: what may be tried.
        make_sampler: builds the sampler from the journal's trials.
        trials: how many trials the sweep shall have in all.
        retries: further attempts of a trial that failed.
        queue: how trials in training take turns; None where each runs to its end at once.
    """

    def __init__(
        self,
        journal: TrialJournal,
        space: Space,
        make_sampler: Callable[[Iterable[Trial]], Sampler],
        trials: int,
        retries: int,
        queue: Queue | None = None,
    ) -> None:
        self.journal = journal
        self.budget = trials
        self.retries = retries
        known, self.ends = journal.load(space)
        self.trials = {trial.number: trial for trial in known}
        self.resumed = len(self.ends)
        self._sampler = make_sampler(known)
        self._exhausted = False
        self._queue = queue
        self._curves = {trial.number: journal.curve(trial.number) for trial in known} if queue else {}
        running = [trial for trial in known if trial.state == RUNNING]
        self._resting = {trial.number for trial in running if self._rests(trial.number)}
        self._waiting = [trial for trial in running if trial.number not in self._resting]

    def next(self) -> Trial | None:
        """A trial to run now: first one that an earlier process left unfinished, then who has the turn, then a new one.

        None when there is none: the budget is spent, the space is exhausted, or what is left is running.
        """
        if self._waiting:
            return self._waiting.pop(0)
        if self._spent:
            return None
        more = len(self.trials) < self.budget and not self._exhausted
        number = self._turn(more)
        if number is not None:
            self._resting.remove(number)
            return self.trials[number]
        if not more:
            return None
        # With nothing new left, those that rest have their turn.
        return self._ask() or self.next()

    def _turn(self, more: bool) -> int | None:
        if self._queue is None:
            return None
        return self._queue.turn(self._curves, self._resting, self.ends, more, self._sampler)

    def _ask(self) -> Trial | None:
        trial = self._sampler.ask()
        if trial is None:
            self._exhausted = True
            return None
        # Written before it runs: a number and a setting are never given out twice, whenever the driver dies.
        self.journal.asked(trial)
        self.trials[trial.number] = trial
        return trial

    def close(self, number: int) -> End:
        """Takes up a trial's end from the journal and tells the sampler."""
        end = self.journal.end(number)
        if end is None:
            end = self.journal.ended(number, End(FAILED, error="the trial left no result", ended=time.time()))
        self.ends[number] = end
        if self._queue:
            self._curves[number] = self.journal.curve(number)
        self._sampler.tell(number, end.state, end.values or None)
        return end

    def rest(self, number: int) -> None:
        """Takes up a trial that rests: it goes on when it has the turn."""
        self._curves[number] = self.journal.curve(number)
        self._resting.add(number)

    def _rests(self, number: int) -> bool:
        return self._queue is not None and len(self._curves[number]) - 1 in resting_rungs(self._queue.length)

    @property
    def resting(self) -> int:
        """Trials that have been trained in part and wait for their turn."""
        return len(self._resting)

    @property
    def _spent(self) -> bool:
        return self._queue is not None and self._queue.spent(self._curves)

    @property
    def left(self) -> int:
        """Trials that are still to be run."""
        if self._spent:
            return 0
        return max(0, (len(self.trials) if self._exhausted else self.budget) - len(self.ends))


def run_trial(journal: TrialJournal, trial: Trial, measure: Measure, retries: int) -> End | None:
    """Runs a trial until it has an end in the journal: measured, infeasible, or failed too often. None: it rests.

    Args:
        journal: where the end is written, by whoever runs the trial: a dead driver loses nothing.
        trial: what to run.
        measure: the work; may raise anything.
        retries: further attempts after a failed one. Failed attempts of earlier processes count.
    """
    known = journal.end(trial.number)
    if known is not None:
        return known
    while True:
        begun = time.time()
        try:
            found = measure(trial)
            if found is None:
                return None
            end = found
        except OutOfMemory as error:
            end = _no_result(INFEASIBLE, f"out of memory: {error}", begun)
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, (DataError, StorageGoneError)):
                # The same mistake would be found again; storage that is away comes back.
                return journal.ended(trial.number, _no_result(FAILED, str(error), begun))
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if journal.failed(trial.number, text) <= retries:
                continue
            end = _no_result(FAILED, text, begun)
        return journal.ended(trial.number, end)


def _no_result(state: str, error: str, begun: float) -> End:
    now = time.time()
    return End(state, error=error[:2000], seconds=now - begun, ended=now)


def measured(state: str, values: dict[str, float], details: dict[str, Any], begun: float) -> End:
    """The end of a trial that was measured, `begun` seconds after the epoch."""
    now = time.time()
    return End(state, values, details, seconds=now - begun, ended=now)
