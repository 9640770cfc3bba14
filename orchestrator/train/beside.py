"""Rank 0's part in evaluations beside the training: which checkpoints are measured, and what comes back of each.

A position that calls for an evaluation asks for a checkpoint; once that is committed, the launcher is asked to have it
measured, and training goes on. While an earlier save is still being written there is no checkpoint at that very step:
then the next one is measured instead, and its numbers carry its own step. The wish is part of the checkpoint, so a run
that goes on after any kind of death finds what was asked for and has no result; such a checkpoint is not retired.
"""

from __future__ import annotations

from typing import Any

from orchestrator.checkpoint.store import CheckpointError, CheckpointStore
from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import StorageError
from orchestrator.train.context import RunContext
from orchestrator.train.records import RunRecords
from orchestrator.train.results import DONE, LOST, Request, Result, describe, keep, kept
from orchestrator.train.state import TrainState

WISH, TAKEN = "evaluate", "evaluations"
"""In a checkpoint's state: whether it is to be measured, and the steps whose results it knows already."""


class Beside:
    """Used by the training thread only; no method but `resume` and `give_up` waits for anything.

    Args:
        config: resolved configuration.
        run: line to the launcher.
        store: of the checkpoints.
        state: learns what is the best and who was right.
        records: where metrics go.
    """

    def __init__(
        self, config: JobConfig, run: RunContext, store: CheckpointStore, state: TrainState, records: RunRecords
    ) -> None:
        self._config, self._run, self._store = config, run, store
        self._state, self._records = state, records
        self._wanted_at = -1
        self._flagged: set[int] = set()
        self._seen = 0
        self._open: set[int] = set()
        self._taken: set[int] = set()
        self.newest = -1
        """Step of the newest evaluation, inside ones included."""

    @property
    def open(self) -> int:
        """How many evaluations are under way or wait."""
        return len(self._open)

    def want(self, step: int) -> None:
        """This position is to be measured, or the first later one that has a checkpoint."""
        if step == self._store.last_committed:
            self._ask(step)
        elif step not in self._open | self._taken:
            self._wanted_at = step

    def facts(self, step: int, *, due: bool) -> dict[str, Any]:
        """What goes into the state of a checkpoint that is being taken.

        Args:
            step: of the checkpoint.
            due: the position calls for an evaluation, but `want` was not told yet.
        """
        wish = due or self._wanted_at >= 0
        if wish:
            self._flagged.add(step)
            self._pin()
        return {WISH: wish, TAKEN: sorted(self._taken)}

    def look(self) -> None:
        """Asks for what was committed, and takes what came back."""
        new = self._store.committed[self._seen :]
        self._seen += len(new)
        for step in new:
            if step in self._flagged:
                self._wanted_at = -1 if self._wanted_at <= step else self._wanted_at
                self._ask(step)
            self._flagged = {flagged for flagged in self._flagged if flagged > step}
        for result in self._run.evaluated():
            self._take(result)
        self._pin()

    def resume(self, saved: dict[str, Any], *, active: bool) -> None:
        """Takes up what an earlier attempt asked for; reads run storage.

        Args:
            saved: state of the checkpoint that is resumed from.
            active: whether this attempt has anybody who measures.
        """
        self._taken = set(saved.get(TAKEN, []))
        self.newest = max(self._taken, default=-1)
        for result in kept(self._run.folder, without=self._taken):
            self._take(result)
        for step in self._store.steps():
            if step not in self._taken and self._wished(step):
                if active:
                    self._ask(step)
                else:
                    self._lose(step, "the run went on with eval.where=inside before it was measured")
        self._pin()

    def _wished(self, step: int) -> bool:
        try:
            return bool(self._store.state_of(step).get(WISH, False))
        except CheckpointError:
            return True  # a damaged one: measuring it will say so

    def give_up(self, why: str) -> None:
        """Nobody waits any longer for what is not there yet: it is recorded as lost."""
        for step in sorted(self._open | ({self._wanted_at} - {-1})):
            self._lose(step, why)

    def summary(self) -> str:
        """What all evaluations beside the training came to; "" when there were none."""
        try:
            return describe(kept(self._run.folder))
        except StorageError as error:
            return f"unknown: {error}"

    def _ask(self, step: int) -> None:
        if step in self._open | self._taken:
            return
        self._open.add(step)
        self._run.ask_evaluation(Request(step, self._state.best_value))

    def _lose(self, step: int, why: str) -> None:
        result = Result(step, LOST, error=why)
        try:
            keep(self._run.folder, result)
        except StorageError as error:
            self._run.note(f"warning: {error}")
        self._take(result)

    def _take(self, result: Result) -> None:
        step = result.step
        if step in self._taken:
            return
        self._taken.add(step)
        self._open.discard(step)
        if result.state != DONE:
            reason = (result.error.strip().splitlines() or ["no reason is known"])[-1]
            self._run.note(f"warning: the evaluation of step {step} is {result.state}: {reason}")
            self._records.no_evaluation(step, result.state, result.error)
            return
        state, checkpoint, newest = self._state, self._config.checkpoint, step > self.newest
        self._records.evaluation(step, result.metrics, newest=newest)
        older, newer = (state.answers, result.answers) if newest else (result.answers, state.answers)
        state.answers = {**older, **newer}
        self.newest = max(self.newest, step)
        if state.note_best(result.metrics, checkpoint.best_metric, checkpoint.best_mode, step):
            self._store.best = step

    def _pin(self) -> None:
        self._store.pinned = frozenset(self._flagged | self._open)
