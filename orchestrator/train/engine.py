"""What the loop's verbs do: one rank's model, data position, checkpoints, records and evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from itpn_core.errors import CollapseError, UserError
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.loader import Batch, Loader, open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.order import SampleOrder
from orchestrator.data.views import train_view
from orchestrator.train.context import RunContext
from orchestrator.train.kind import Kind, open_kind
from orchestrator.train.optimizer import build_optimizer, lr_factor, parameter_groups, peak_lr
from orchestrator.train.records import RunRecords
from orchestrator.train.saving import Saver, load_agreed
from orchestrator.train.state import TrainState, WeightAverage
from orchestrator.train.step import Step
from orchestrator.train.window import Window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run (or one attempt at it) came to."""

    step: int
    stopped: str
    """Reason of a stop request; "" when the run is complete."""
    seconds: float
    first_loss: float
    last_loss: float
    images_per_second: float
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Accuracy and its standard error by what was measured."""
    differences: list[str] = field(default_factory=list)
    protocol: str = ""


class Engine:
    """One rank of one run; used as a context manager so that threads and loaders end with it."""

    def __init__(self, config: JobConfig, run: RunContext) -> None:
        self.config = config
        self.run = run
        self._exit = ExitStack()
        manifest = Manifest.load(config.data.source, config.data.store)
        self.train_split = manifest.split(config.data.train_split)
        self.order = training_order(config, self.train_split.samples)
        self.steps_per_epoch = self.order.batches_per_epoch(config.train.global_batch)
        self.total = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        self.kind = open_kind(config, run, manifest)
        self.state = build_state(config, self.kind, run.device)
        self.peak_lr = peak_lr(config.train.optimizer, config.train.global_batch)
        self.step_fn: Step | None = None
        self.window: Window | None = None
        self.checkpoints = CheckpointStore(run.folder, config.checkpoint.keep)
        self.saver = Saver(config.checkpoint, self.checkpoints, config.train.log_every, run.note)
        self.records = RunRecords(config, run, manifest, self.kind)
        self._collapsed = ""
        self._loader: Loader | None = None
        self._evaluated = -1
        self._watched_step = -1
        self._clock = time.perf_counter()
        self._window_clock = self._clock
        self._waited = 0.0

    def __enter__(self) -> Engine:
        self._exit.callback(self.checkpoints.close)
        self._exit.callback(self.records.close)
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    # -- start ------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Loads the newest whole checkpoint, or does what a fresh run begins with."""
        snapshot = load_agreed(self.checkpoints, self.run)
        if snapshot is not None:
            self.state.restore(snapshot)
            self.run.note(f"resumed from the checkpoint of step {self.state.step} of {self.total}")
        else:
            self.kind.start(self.state.task)
            self.state.average.restart()
        self.step_fn = Step(
            self.state, self.config.train, self.config.data, self.total, self.peak_lr, self.run.device, self.run.world
        )
        self._clock = time.perf_counter()
        self.records.started(self.state, self.total, self.peak_lr)

    @property
    def epoch(self) -> int:
        """0-based epoch of the next step."""
        return self.state.step // self.steps_per_epoch

    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.total

    # -- data -------------------------------------------------------------------------------------------------------

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """This rank's parts of the global batches from the current position to the end of the epoch or run."""
        first = self.state.step % self.steps_per_epoch
        stop = min(self.steps_per_epoch, first + self.total - self.state.step)
        self._window_clock = time.perf_counter()
        loader = open_loader(
            self.config.data,
            self.train_split,
            seed=self.config.train.seed,
            epoch=self.epoch,
            first_batch=first,
            stop_batch=stop,
            global_batch=self.config.train.global_batch,
            rank=self.run.rank,
            world=self.run.world,
            view=train_view(self.config.data),
            quarantined=self.state.quarantined,
            pairs=self.state.task.paired,
        )
        self._loader = loader
        with loader as batches:
            yield batches

    def waited(self, seconds: float) -> None:
        """Counts time in which the step had no data."""
        self._waited += seconds

    # -- steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> None:
        """One optimizer step; its losses stay on the device."""
        assert self.step_fn is not None  # noqa: S101 -- restore() comes first
        count = self.order.batch_size(batch.index, self.config.train.global_batch)
        values = self.step_fn(batch, count)
        if self.window is None:
            self.window = Window(tuple(values), self.config.train.log_every, self.run.device, self.run.world)
        self.window.add(values)

    def window_due(self) -> bool:
        """Whether it is time to look at the losses: the window is full, or an epoch or the run ends."""
        step = self.state.step
        return self.window is not None and (self.window.full or step % self.steps_per_epoch == 0 or step >= self.total)

    def read_window(self) -> tuple[str, bool]:
        """Brings the losses to the host, records them, and agrees with the other ranks on what to do.

        Returns:
            (reason of a stop request or "", whether a checkpoint is due now).

        Raises:
            UserError: the guard's budget of refused steps is spent.
            CollapseError: the features have lost their spread.
            StorageGoneError: no checkpoint could be committed for too long.
        """
        assert self.window is not None  # noqa: S101 -- window_due() said so
        leads = self.run.rank == 0
        reason = self.run.stop_reason() if leads else ""
        overdue = self.saver.overdue() if leads else ""
        flags = [bool(reason), leads and self._save_due(), leads and self._collapse(), bool(overdue)]
        reading = self.window.read(flags)
        now = time.perf_counter()
        seconds, self._window_clock = max(now - self._window_clock, 1e-9), now
        self._account(reading.rows, seconds)
        stop, save, collapsed, gone = reading.flags
        if gone:
            raise StorageGoneError(overdue or "rank 0 could not commit a checkpoint for too long")
        if collapsed:
            raise CollapseError(self._collapsed or "rank 0 found that the features have collapsed")
        return (reason or "stop requested") if stop else "", save

    def _collapse(self) -> bool:
        """Whether a task that is watched has lost the spread of its features; rank 0 looks every 25 steps."""
        state = self.state
        if not state.task.watched or state.step // 25 == self._watched_step // 25:
            return False
        self._watched_step = state.step
        health = self.kind.health(state.task)
        self.records.health(state.step, health)
        try:
            state.task.watch(state.step, health)
        except CollapseError as error:
            self._collapsed = str(error)
            return True
        return False

    def _account(self, rows: list[dict[str, float]], seconds: float) -> None:
        state, batch = self.state, self.config.train.global_batch
        first = state.step - len(rows)
        for offset, row in enumerate(rows):
            if row["skipped"]:
                state.skipped.append(first + offset)
        # Single steps are noisy; the first and the last window stand for the start and the end.
        state.last_loss = sum(row["loss"] for row in rows) / len(rows)
        if state.first_loss is None:
            state.first_loss = state.last_loss
        speed = len(rows) * batch / seconds
        state.seconds += seconds
        wait, self._waited = self._waited / seconds, 0.0
        lrs = [self.peak_lr * lr_factor(first + i, self.total, self.config.train.optimizer) for i in range(len(rows))]
        self.records.window(first, rows, lrs, speed, wait)
        if self.run.rank == 0:
            self.run.progress(
                "training", step=state.step, total=self.total, epoch=(state.step - 1) // self.steps_per_epoch,
                loss=rows[-1]["loss"], speed=speed, seconds_per_step=seconds / len(rows),
            )  # fmt: skip
        self._check_budget()

    def _check_budget(self) -> None:
        budget = self.config.train.guard.skip_budget
        if len(self.state.skipped) > budget:
            raise UserError(
                f"the gradient was not finite or spiked at step {self.state.skipped[-1]} (in all at steps "
                f"{self.state.skipped}); the weights were not changed by it. train.guard.skip_budget={budget} allows "
                "no more: lower train.optimizer.lr, look at the samples of that step, or raise the budget"
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        # The end of an epoch decides by itself.
        return self.state.step % self.steps_per_epoch != 0 and self.saver.due(self.state.step)

    def epoch_save_due(self) -> bool:
        """Whether the end of this epoch, or of the run, calls for a checkpoint."""
        every = self.config.checkpoint.every_epochs
        return self.finished() or (every > 0 and self.epoch % every == 0)

    def save(self) -> None:
        """Copies the state to the host and lets a background thread write it (rank 0)."""
        self._merge_quarantined()
        if self.run.rank == 0:
            self.saver.save(self.state.step, self._take)

    def _take(self) -> tuple[Snapshot, Callable[[], None]]:
        return self.state.snapshot({"steps_per_epoch": self.steps_per_epoch}), self.records.commit()

    def _settle(self, *, stopping: bool) -> None:
        """Waits until the state is on storage; the other ranks have nothing to add and need not wait."""
        if self.run.rank == 0:
            self.saver.settle(self.state.step, self._take, stopping=stopping)

    def _merge_quarantined(self) -> None:
        """Makes the list of holes the same on all ranks before it is saved; nothing to do without a budget."""
        budget = self.config.data.quarantine_budget
        if not budget:
            return
        mine = self._loader.counters.quarantined if self._loader else []
        parts: list[list[int]] = [mine]
        if self.run.world > 1:
            parts = [[] for _ in range(self.run.world)]
            dist.all_gather_object(parts, mine)
        self.state.quarantined = sorted({*self.state.quarantined, *(i for part in parts for i in part)})
        if len(self.state.quarantined) > budget:
            raise UserError(
                f"{len(self.state.quarantined)} samples are damaged, data.quarantine_budget={budget} allows fewer: "
                f"ids {self.state.quarantined[:20]}. Repair them (jobs/index_shards.py --verify finds them) or raise it"
            )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_due(self) -> bool:
        """Before the first step, after every N epochs, and at the end; once per position."""
        step, every = self.state.step, self.config.eval.every_epochs
        if self._evaluated == step:
            return False
        at_epoch = step % self.steps_per_epoch == 0
        return step == 0 or step >= self.total or (every > 0 and at_epoch and self.epoch % every == 0)

    def evaluate(self) -> None:
        """Measures the averaged (or live) weights on all ranks; records it and reports to the launcher."""
        self.run.progress("evaluating", step=self.state.step, total=self.total)
        state = self.state
        state.average.swap()
        try:
            metrics = self.kind.evaluate(state.task, state.step, state.answers)
            if self.run.rank == 0:
                self.records.figures(self.kind.figures(state.task, state.step))
        finally:
            state.average.swap()
        self._evaluated = state.step
        self.records.evaluation(state, metrics)
        self.run.report({"step": float(state.step), **metrics}, self.checkpoints.last_committed)

    # -- end --------------------------------------------------------------------------------------------------------

    def stopped(self, reason: str) -> Outcome:
        """Ends early, after the checkpoint is on storage."""
        self._settle(stopping=True)
        self.records.state("stopped", reason)
        return self._outcome(reason)

    def finish(self) -> Outcome:
        """Ends the run: exports the final weights and sums up."""
        self._settle(stopping=False)
        self.records.final(self.state)
        return self._outcome("")

    def _outcome(self, stopped: str) -> Outcome:
        state = self.state
        return Outcome(
            step=state.step,
            stopped=stopped,
            seconds=state.seconds,
            first_loss=state.first_loss if state.first_loss is not None else float("nan"),
            last_loss=state.last_loss if state.last_loss is not None else float("nan"),
            images_per_second=state.step * self.config.train.global_batch / max(state.seconds, 1e-9),
            **self.kind.summary(state.answers),
        )


def training_order(config: JobConfig, samples: int) -> SampleOrder:
    """The order of samples that a configuration stands for."""
    data = config.data
    return SampleOrder(samples, config.train.seed, data.streams, data.run, data.block_runs, data.last_batch)


def build_state(config: JobConfig, kind: Kind[Any], device: torch.device) -> TrainState:
    """A fresh training state; equal on every rank because the seed is."""
    torch.manual_seed(config.train.seed)
    task = kind.build_task().to(device)
    if config.train.precision == "fp64":
        task = task.double()
    task.train()
    trainable = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    lr = peak_lr(config.train.optimizer, config.train.global_batch)
    optimizer = build_optimizer(parameter_groups(trainable, config.train.optimizer, lr), config.train.optimizer)
    average = WeightAverage(trainable, config.train.optimizer.average_decay)
    mean = torch.zeros((), device=device, dtype=torch.float64 if config.train.precision == "fp64" else torch.float32)
    return TrainState(task, optimizer, average, grad_norm_mean=mean)
