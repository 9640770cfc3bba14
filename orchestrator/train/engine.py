"""What the loop's verbs do: one rank's model, data position, checkpoints, records and evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from itpn_core.errors import CollapseError, UserError
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.loader import Batch, Loader, open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.quarantine import Damage
from orchestrator.data.views import train_view
from orchestrator.track.journal import JournalError
from orchestrator.train.beside import WISH, Beside
from orchestrator.train.build import build_state, training_order
from orchestrator.train.compiling import run_eager
from orchestrator.train.context import CLOSING, PREEMPTED, RunContext
from orchestrator.train.goodput import Goodput
from orchestrator.train.hosts import find_hosts
from orchestrator.train.kind import open_kind
from orchestrator.train.monitor import Monitor
from orchestrator.train.optimizer import make_schedule
from orchestrator.train.outcome import Outcome
from orchestrator.train.parallel import open_mesh
from orchestrator.train.precision import agreed_precision
from orchestrator.train.profile import ProfileConfig, Profiler
from orchestrator.train.records import RunRecords
from orchestrator.train.saving import PRECISION, Saver, changed_since, fingerprints, follow_leader, load_agreed
from orchestrator.train.step import Step
from orchestrator.train.watchdog import Watchdog
from orchestrator.train.window import Window

log = logging.getLogger(__name__)
UNWRITTEN = "a journal cannot be written"
_READ_S = 60.0
"""What the last try to read may take after the time to give up has come."""


class Engine:
    """One rank of one run; used as a context manager so that threads and loaders end with it."""

    def __init__(self, config: JobConfig, run: RunContext) -> None:
        self.config = config
        self.run = run
        self.goodput = Goodput(run)  # counts as restart until `restore` is done
        remote = "://" in config.data.source
        patience_s = config.data.store.give_up_s + _READ_S if remote else 0.0
        self.watchdog = Watchdog(config.train.guard, run, self.goodput.watch, patience_s=patience_s)
        self._exit = ExitStack()
        manifest = Manifest.load(config.data.source, config.data.store)
        self.train_split = manifest.split(config.data.train_split)
        self.order = training_order(config, self.train_split.samples)
        self.steps_per_epoch = self.order.batches_per_epoch(config.train.global_batch)
        self.total = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        self.precision = agreed_precision(config.train.precision, run.device, run.world)
        """The format that this group computes in."""
        computing = replace(config, train=replace(config.train, precision=self.precision))
        self.kind = open_kind(computing, run, manifest)
        self.state = build_state(config, self.kind, run.device, run.world, open_mesh(config.train, run))
        self.schedule = make_schedule(
            config.train.optimizer, config.train.global_batch, self.total, self.steps_per_epoch
        )
        self.step_fn: Step | None = None
        self.window: Window | None = None
        self.checkpoints = CheckpointStore(
            run.folder, config.checkpoint.keep, config.checkpoint.keep_every_steps, fingerprints(config, manifest, run),
            run.term, self.state.parallel.together,
        )  # fmt: skip
        self._all_save = self.state.parallel.together is not None
        agree = follow_leader if self._all_save else int
        self.saver = Saver(config.checkpoint, self.checkpoints, run.note, agree=agree)
        self.records = RunRecords(config, run, manifest, self.kind)
        self.monitor = Monitor(
            config, run, self.state, self.kind, self.records, self.total, self.steps_per_epoch, self.schedule,
            self.order,
        )  # fmt: skip
        profiled = ProfileConfig() if run.rank else config.profile  # ranks of a host share the directory
        self.profiler = Profiler(profiled, run.directory, self.records.trace)
        self._loader: Loader | None = None
        self._evaluated = -1
        self._apart = config.eval.where == "beside"  # the launcher has resolved "auto"
        self.beside = None if run.rank else Beside(config, run, self.checkpoints, self.state, self.records)

    def __enter__(self) -> Engine:
        self.watchdog.start()
        self._exit.callback(self.watchdog.close)
        self.goodput.start()
        self._exit.callback(self.goodput.close)
        self._exit.callback(self.checkpoints.close, self.config.checkpoint.stop_deadline_s)
        self._exit.callback(self.profiler.close)
        self._exit.callback(self.records.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.watchdog.end()  # also after an error, what is on its way to storage may take longer than a step
        if kind is not None:
            self.run.progress(CLOSING, step=self.state.step, total=self.total)
        self._exit.close()

    # -- start ------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Loads the newest whole checkpoint, or does what a fresh run begins with."""
        self.watchdog.begin()
        self.watchdog.collective("choice of the checkpoint")
        snapshot = load_agreed(self.checkpoints, self.run, self.state.wanted())
        if snapshot is not None:
            self.state.restore(snapshot)
            self.checkpoints.best = self.state.best_step
            self.run.note(f"resumed from the checkpoint of step {self.state.step} of {self.total}")
            for line in changed_since(snapshot, self.checkpoints.made_by, self.precision):
                self.run.note(f"warning: {line}")
        else:
            self.state.parallel.start(self.kind.start)
            self.state.average.restart()
        self.goodput.resume(self.state.ledger, self.state.step)
        self.state.parallel.begin()
        self.step_fn = Step(
            self.state,
            replace(self.config.train, precision=self.precision),
            self.config.data,
            self.schedule,
            self.run.device,
            self.run.world,
        )
        with self.state.parallel.whole() as task:
            if self.run.rank == 0:
                self.monitor.measure_utilisation(task)
        self.watchdog.collective("hosts of the ranks")
        self.records.started(self.state, self.schedule, find_hosts(self.run))
        saved = snapshot.state if snapshot else {}
        if self.beside and (self._apart or WISH in saved):
            self.beside.resume(saved, active=self._apart)
        # Told before the first step: whether a group starts or goes on shows in the step that it begins with.
        self.run.progress("starting", step=self.state.step, total=self.total)
        self.goodput.watch.leave()

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
        with self.goodput.span("data"):
            first = self.state.step % self.steps_per_epoch
            stop = min(self.steps_per_epoch, first + self.total - self.state.step)
            self.monitor.begin()
            self._merge_quarantined()  # what the last epoch's loader found
            loader = self._open_loader(first, stop)
        timed = self._timed(loader)
        try:
            yield timed
        finally:
            timed.close()
            with self.goodput.span("data"):
                loader.close()

    def _open_loader(self, first: int, stop: int) -> Loader:
        self._loader = open_loader(
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
        return self._loader

    def _timed(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Hands the batches on; counts the time without one as data wait, and that until the next is asked as compute.

        What the loop does in between and is something else (saving, evaluation) has spans of its own in there. A step
        and the reading of a window have theirs too: the watchdog takes every span for a sign of life.
        """
        while True:
            asked = time.perf_counter()
            with self.goodput.span("data"):
                batch = next(batches, None)
            self.monitor.waited(time.perf_counter() - asked)
            if batch is None:
                return
            with self.goodput.span("compute"):
                yield batch

    # -- steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> None:
        """One optimizer step; its losses stay on the device."""
        assert self.step_fn is not None  # noqa: S101 -- restore() comes first
        count = self.order.batch_size(batch.index, self.config.train.global_batch)
        self.watchdog.take_up(batch.ids.tolist())
        self.watchdog.collective(f"gradients of step {self.state.step}")
        self.profiler.before(self.state.step)
        with self.goodput.span("compute"):
            values = self.step_fn(batch, count)
            if self.window is None:
                self.window = Window(tuple(values), self.config.train.log_every, self.run.device, self.run.world)
            self.window.add(values)
        self.profiler.after(self.state.step - 1)
        self.watchdog.stepped(self.state.step)

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
            FencedError: another driver has the run.
        """
        assert self.window is not None  # noqa: S101 -- window_due() said so
        leads = self.run.rank == 0
        if self._apart and self.beside:
            self.beside.look()
        reason = self.run.stop_reason() if leads else ""
        ended = self.saver.ended() if leads else None
        self.watchdog.collective(f"losses up to step {self.state.step}")
        with self.goodput.span("compute"):
            unwritten = bool(self.records.trouble())
            flags = [bool(reason), leads and self._save_due(), self.monitor.collapsed(), ended is not None, unwritten]
            reading = self.window.read(flags, self.goodput.sums())
            self.goodput.take(reading.sums, self.state.step)
            self.monitor.window(reading.rows, self.goodput.metrics() | self.saver.metrics() | self.records.losses())
        stop, save, collapsed, gone, unwritten = reading.flags
        if gone:
            raise ended or StorageGoneError("rank 0 may not or cannot commit checkpoints; its own message says why")
        if collapsed:
            raise CollapseError(self.monitor.collapse or "rank 0 found that the features have collapsed")
        if unwritten:
            return UNWRITTEN, save
        return (reason or "stop requested") if stop else "", save

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        at_border = self.state.step % self.steps_per_epoch == 0 or self.finished()
        if at_border and self.epoch_save_due():
            return False  # the loop saves there by itself
        return self.saver.due(self.state.step)

    def epoch_save_due(self) -> bool:
        """Whether the end of this epoch, or of the run, calls for a checkpoint."""
        every = self.config.checkpoint.every_epochs
        return self.finished() or (every > 0 and self.epoch % every == 0)

    def save(self) -> None:
        """Copies the state to the host and lets a background thread write it: rank 0, or every rank its part."""
        with self.goodput.span("checkpoint"):
            self._merge_quarantined()
            if self._apart and self.beside:
                self.beside.look()  # before another commit, which may retire what is to be measured
            if self._all_save or self.run.rank == 0:
                self.saver.save(self.state.step, self._take)

    def _take(self) -> tuple[Snapshot, Callable[[], None]]:
        self.state.ledger = self.goodput.ledger
        facts: dict[str, Any] = {"steps_per_epoch": self.steps_per_epoch, PRECISION: self.precision}
        if self._apart and self.beside:
            due = self.evaluation_due() and not self.finished()
            facts |= self.beside.facts(self.state.step, due=due)
        return self.state.snapshot(facts), self.records.commit()

    def _settle(self, *, stopping: bool) -> None:
        """Waits until the state is on storage; ranks that have nothing to add need not wait."""
        self.watchdog.end()
        self.watchdog.collective("seconds of all ranks")
        self.goodput.end(self.state.step)
        if self._all_save or self.run.rank == 0:
            with self.goodput.span("checkpoint"):
                self.saver.settle(self.state.step, self._take, stopping=stopping)
        if self.run.rank == 0:
            self.goodput.take(self.goodput.sums(), self.state.step, ended=True)

    def _merge_quarantined(self) -> None:
        """Makes the list of holes the same on all ranks before it is saved; nothing to do without a budget."""
        budget = self.config.data.quarantine_budget
        if not budget:
            return
        mine = [] if self._loader is None else self._loader.counters.damaged  # a loader at its end is falsy
        parts: list[list[Damage]] = [mine]
        if self.run.world > 1:
            self.watchdog.collective("damaged samples of all ranks")
            parts = [[] for _ in range(self.run.world)]
            dist.all_gather_object(parts, mine)
        known = set(self.state.quarantined)
        found = {damage.id: damage for part in parts for damage in part if damage.id not in known}
        if found:
            self.state.quarantined = sorted(known | found.keys())
            self.records.damaged(self.state.step, list(found.values()), len(self.state.quarantined))
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
        """Measures the averaged (or live) weights on all ranks; records it and reports to the launcher.

        Beside the training only the wish is noted and a checkpoint started. At the end of a run no step is left to wait
        and all ranks have the weights at hand, so the last evaluation is theirs in any case.
        """
        if self._apart and not self.finished():
            self._want_evaluation()
            return
        self.watchdog.collective(f"features for the evaluation at step {self.state.step}")
        with self.goodput.span("evaluation"), run_eager():
            self._evaluate()

    def _want_evaluation(self) -> None:
        if self.beside:
            self.beside.want(self.state.step)
        self.save()
        self._evaluated = self.state.step

    def _await_evaluations(self) -> None:
        """Waits for those beside the training, within the limit; a collective call a second, so that none times out."""
        agree = follow_leader if self.run.world > 1 else int
        wait_s, began = self.config.eval.wait_s, time.monotonic()
        self.watchdog.collective("evaluations beside the training")
        with self.goodput.span("evaluation"):
            if self.beside:
                self.checkpoints.wait()  # the last one that is to be measured may still be on its way
                self.beside.look()
            while agree(self.beside.open if self.beside else 0):
                with self.goodput.span("evaluation"):  # a sign of life for the watchdog
                    time.sleep(0.5)
                if self.beside:
                    self.beside.look()
                    if time.monotonic() - began > wait_s:
                        self.beside.give_up(f"it was not done {wait_s:g} s after the end (eval.wait_s)")
            if self.beside:
                self.beside.give_up("no checkpoint was committed for it")

    def _evaluate(self) -> None:
        self.run.progress("evaluating", step=self.state.step, total=self.total)
        state = self.state
        with state.averaged() as task:
            metrics = self.kind.evaluate(task, state.step, state.answers)
            if self.run.rank == 0:
                self.records.figures(self.kind.figures(task, state.step))
            self.records.evaluation(state.step, metrics)
            if self.beside:
                self.beside.newest = state.step
            if state.note_best(
                metrics, self.config.checkpoint.best_metric, self.config.checkpoint.best_mode, state.step
            ):
                self.checkpoints.best = state.step
                self.records.best(task, state.step)
        self._evaluated = state.step
        self.run.report({"step": float(state.step), **metrics}, self.checkpoints.last_committed)

    # -- end --------------------------------------------------------------------------------------------------------

    def stopped(self, reason: str) -> Outcome:
        """Ends early, after the checkpoint is on storage.

        Raises:
            JournalError: that is why.
        """
        self._settle(stopping=True)
        if reason == UNWRITTEN:
            raise JournalError(self._unwritten())
        self.records.state(PREEMPTED if reason.startswith(PREEMPTED) else "stopped", reason)
        return self._outcome(reason)

    def finish(self) -> Outcome:
        """Ends the run: exports the final weights and sums up.

        Raises:
            JournalError: records were lost since the last step.
        """
        if self._apart:
            self._await_evaluations()
        self._settle(stopping=False)
        with self.goodput.span("checkpoint"):
            with self.state.averaged() as task:
                self.records.final(task, self.state.step, self.state.best_step)
            words = self._unwritten()  # here the other ranks wait for rank 0's last words
        if words:
            raise JournalError(words)
        self.watchdog.collective("last seconds of all ranks")
        self.goodput.end(self.state.step, ended=True)
        return self._outcome("")

    def _unwritten(self) -> str:
        """What is wrong with any host's journal, the same on every rank. Collective."""
        mine = self.records.trouble()
        words = [mine]
        if self.run.world > 1:
            self.watchdog.collective("journals of all hosts")
            words = [""] * self.run.world
            dist.all_gather_object(words, mine)
        told = "; ".join(word for word in words if word)
        return f"{told}, and type the same command again" if told else ""

    def _outcome(self, stopped: str) -> Outcome:
        state = self.state
        speed = state.step * self.config.train.global_batch / max(state.seconds, 1e-9)
        return Outcome(
            step=state.step,
            stopped=stopped,
            seconds=state.seconds,
            first_loss=state.first_loss if state.first_loss is not None else float("nan"),
            last_loss=state.last_loss if state.last_loss is not None else float("nan"),
            images_per_second=speed,
            mfu=self.monitor.mfu(speed),
            goodput=self.goodput.ledger.describe(),
            restarts=self.goodput.ledger.restarts,
            redone_steps=self.goodput.ledger.redone_steps,
            beside=self.beside.summary() if self._apart and self.beside else "",
            **self.kind.summary(state.answers),
        )
