"""Looks at the numbers of each window: records them, shows progress, and says when a run must not go on."""

from __future__ import annotations

import time

from itpn_core.errors import CollapseError, UserError
from itpn_core.task import Task
from orchestrator.config.tree import JobConfig
from orchestrator.data.order import SampleOrder
from orchestrator.train.context import RunContext
from orchestrator.train.kind import Kind
from orchestrator.train.optimizer import Schedule
from orchestrator.train.peak import Utilisation
from orchestrator.train.records import RunRecords
from orchestrator.train.state import TrainState

WATCH_EVERY = 25


class Monitor:
    """One rank's view of a run's health; only rank 0 writes.

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        state: what is trained.
        kind: measures the features of a task that is watched.
        records: where numbers go.
        total: steps of the whole run.
        steps_per_epoch: for the progress line.
        schedule: learning rates.
        order: tells which samples a refused step had.
    """

    def __init__(
        self, config: JobConfig, run: RunContext, state: TrainState, kind: Kind[Task], records: RunRecords, total: int,
        steps_per_epoch: int, schedule: Schedule, order: SampleOrder,
    ) -> None:  # fmt: skip
        self._config = config
        self._run = run
        self._state = state
        self._kind = kind
        self._records = records
        self._total = total
        self._steps_per_epoch = steps_per_epoch
        self._schedule = schedule
        self._order = order
        self._utilisation: Utilisation | None = None
        self._clock = time.perf_counter()
        self._waited = 0.0
        self._watched_step = -1
        self.collapse = ""
        """Why the features count as collapsed; "" while they do not."""

    def begin(self) -> None:
        """The time from here belongs to the next window."""
        self._clock = time.perf_counter()
        self._waited = 0.0

    def measure_utilisation(self, task: Task) -> None:
        """Finds out what a step computes, so that windows can tell the share of the peak; waits for the device."""
        train, data = self._config.train, self._config.data
        world, device = self._run.world, self._run.device
        self._utilisation = Utilisation(task, data.image_size, train.peak_tflops, device, world)

    def mfu(self, images_per_second: float) -> float:
        """Share of the stated peak; 0 where none is known, and on ranks that do not measure."""
        return self._utilisation.of(images_per_second) if self._utilisation else 0.0

    def waited(self, seconds: float) -> None:
        """Counts time in which the step had no data."""
        self._waited += seconds

    def window(self, rows: list[dict[str, float]], extra: dict[str, float]) -> None:
        """Takes the rows of consecutive steps that ended now.

        Args:
            rows: values by name, one dictionary per step, equal on every rank.
            extra: further metrics of this moment.

        Raises:
            UserError: the guard's budget of refused steps is spent.
        """
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        state, first = self._state, self._state.step - len(rows)
        for step, row in enumerate(rows, start=first):
            if row["skipped"]:
                state.skipped.append(step)
                self._records.refused(step, row, self._samples(step))
        # Single steps are noisy; the first and the last window stand for the start and the end.
        state.last_loss = sum(row["loss"] for row in rows) / len(rows)
        if state.first_loss is None:
            state.first_loss = state.last_loss
        state.seconds += seconds
        speed = len(rows) * self._config.train.global_batch / seconds
        wait, self._waited = self._waited / seconds, 0.0
        steps = range(first, state.step)
        lrs = [self._schedule.lr(step) for step in steps]
        measured = {
            "train/images_per_second": speed,
            "data/wait_fraction": wait,
            "data/bad_samples": float(len(state.quarantined)),
            "train/refused_steps": float(len(state.skipped)),
        }
        if self.mfu(speed):
            measured["train/mfu"] = self.mfu(speed)
        self._records.window(first, rows, lrs, measured | extra)
        if self._run.rank == 0:
            own = {"train/loss": rows[-1]["loss"], "train/seconds_per_step": seconds / len(rows)}
            self._run.measured(state.step, len(rows), own | measured | extra)
            self._run.progress(
                "training", step=state.step, total=self._total, epoch=(state.step - 1) // self._steps_per_epoch,
                loss=rows[-1]["loss"], speed=speed, seconds_per_step=seconds / len(rows),
            )  # fmt: skip
        self._check_budget()

    def _samples(self, step: int) -> list[int]:
        """Sample ids of a step's global batch."""
        epoch, index = divmod(step, self._steps_per_epoch)
        return [int(i) for i in self._order.batch(epoch, index, self._config.train.global_batch)]

    def _check_budget(self) -> None:
        budget, skipped = self._config.train.guard.skip_budget, self._state.skipped
        if len(skipped) > budget:
            raise UserError(
                f"the gradient or the loss was not finite or spiked at step {skipped[-1]} (in all at steps {skipped}); "
                f"the weights were not changed by it. train.guard.skip_budget={budget} allows no more: lower "
                f"train.optimizer.lr, look at its samples (guard/step-{skipped[-1]:08d}.json among the run's files), "
                "or raise the budget"
            )

    def collapsed(self) -> bool:
        """Whether a watched task has lost the spread of its features; looks every 25 steps. Collective."""
        state = self._state
        if not state.task.watched or state.step // WATCH_EVERY == self._watched_step // WATCH_EVERY:
            return False
        self._watched_step = state.step
        with state.parallel.whole() as task:
            if self._run.rank:
                return False
            health = self._kind.health(task)
        self._records.health(state.step, health)
        try:
            state.task.watch(state.step, health)
        except CollapseError as error:
            self.collapse = str(error)
        return bool(self.collapse)
