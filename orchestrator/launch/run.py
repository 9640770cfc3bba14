"""The driver of a training run: checks first, then the lease, then Ray Train, then the end table."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from itpn_core.errors import UserError
from orchestrator.checkpoint.runlog import FencedError
from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.tree import JobConfig, with_where
from orchestrator.data.folder import Folder, StorageError
from orchestrator.launch.background import background
from orchestrator.launch.board import Admission, News, open_board, watch
from orchestrator.launch.check import Checked, check
from orchestrator.launch.cli import EXIT_FAILED, EXIT_HELD, EXIT_INTERRUPTED, EXIT_OK, EXIT_STORAGE
from orchestrator.launch.cluster import Resources, connected, request, start_timeout_s
from orchestrator.launch.desk import Desk
from orchestrator.launch.evaluations import Job, RayRunner, looking, resolve_where
from orchestrator.launch.failure import ControllerGoneError, root_cause
from orchestrator.launch.finish import end_table, record_end
from orchestrator.launch.lease import HeldError, Lease
from orchestrator.launch.metrics import DriverMetrics
from orchestrator.launch.nodes import check_nodes, make_question
from orchestrator.launch.record import KEY, Lifecycle, open_record
from orchestrator.launch.say import say, settle
from orchestrator.launch.show import ProgressLine, duration
from orchestrator.launch.stops import StopRequest, Stops
from orchestrator.launch.trainer import GROUP_STARTS, make_trainer
from orchestrator.launch.waiting import Waiting, end_controller
from orchestrator.track.environment import driver_facts
from orchestrator.track.journal import JournalError
from orchestrator.train.context import PREEMPTED
from orchestrator.train.hangs import untold


class EndError(StorageError):
    """The training came to its end, and storage does not take the news."""


def run_training(config: JobConfig, recipe: str) -> int:
    """Runs one training; returns the exit code (docs/operations.md lists them)."""
    try:
        with Stops() as stops:
            return _run(config, recipe, stops)
    except StopRequest as stop:
        say(f"stopped ({stop}) before the run was touched. Type the same command again to go on.")
        return EXIT_OK
    except KeyboardInterrupt:
        _end_at_once()


def _end_at_once() -> NoReturn:
    """Ends the process after a second signal; Ray is disconnected by now.

    Not as interpreters end: the thread that waits for the workers still is inside Ray, and torn down under it the
    process would sometimes end with SIGSEGV, which no exit code documents.
    """
    say("interrupted", error=True)
    settle()
    os._exit(EXIT_INTERRUPTED)


def _run(config: JobConfig, recipe: str, stops: Stops) -> int:
    with stops.interrupting():
        checked = check(config)
    fields = {**result_fields(config, checked.manifest.fingerprint), **checked.inputs}
    name = config.run.name or f"{recipe}-{fingerprint(fields)[:8]}"
    config = replace(config, run=replace(config.run, name=name))
    folder = Folder(f"{config.run.storage}/{name}", config.data.store)
    record = open_record(folder, fields, name)
    if record.finished:
        say(f"run {name} is finished already; nothing to do. A new run needs another run.name or other settings.")
        say(end_table(config, folder, record.summary))
        return EXIT_OK
    try:
        with Lease(folder, config.run.lease_s) as lease:
            # Read again: until now another driver may have written it.
            record = open_record(folder, fields, name).next_attempt()
            return _Attempt(config, recipe, checked, folder, Lifecycle(folder, record, lease), lease, stops).run()
    except (HeldError, FencedError) as error:
        say(f"error: {error}", error=True)
        return EXIT_HELD
    except EndError as error:
        say(f"error: {error}", error=True)
        return EXIT_STORAGE
    except JournalError as error:
        say(f"error: {error}", error=True)
        return EXIT_FAILED


class _Attempt:
    """One start of the run by the driver that owns it.

    Args:
        config: resolved configuration with the run's name.
        recipe: name of the recipe.
        checked: what the checks found.
        folder: the run's.
        life: the run's record, with this attempt counted.
        lease: what makes the run ours.
        stops: requests to stop.
    """

    def __init__(
        self, config: JobConfig, recipe: str, checked: Checked, folder: Folder, life: Lifecycle, lease: Lease,
        stops: Stops,
    ) -> None:  # fmt: skip
        self._config, self._folder, self._life, self._lease = config, folder, life, lease
        self._stops = stops
        self._manifest = checked.manifest.fingerprint
        self._facts = {"recipe": recipe, **driver_facts()}
        self._started = time.monotonic()
        self._part = 0
        self._board: Any = None

    def run(self) -> int:
        """Trains to the end, or to what ends it; returns the exit code.

        Raises:
            FencedError: another driver has the run now.
        """
        self._life.enter("starting")
        attempts = self._life.record.attempts
        start = "start" if attempts == 1 else f"attempt {attempts}"
        say(f"run {self._config.run.name} ({start})  in {self._folder.uri}")
        if self._lease.taken_from:
            say(self._lease.taken_from)
        try:
            with contextlib.ExitStack() as stack:
                with self._stops.interrupting():
                    resources = self._prepare(stack)
                self._metrics = DriverMetrics(self._config.run.name)
                stack.callback(self._metrics.close)
                with looking(self._desk(resources)):
                    returned, cause = self._train(resources)
        except StopRequest as stop:
            returned, cause = {"waited": str(stop)}, ("", "")
        except UserError as error:
            # What waits for the tracking server is bounded, and with the server away the record stays in the journal.
            self._end("failed", str(error))
            raise
        with contextlib.suppress(StorageError):  # when storage is away, nobody else can have taken the run
            self._lease.check()
        if "refused" in returned:
            return self._refused(returned["refused"], int(returned["exit"]))
        if "waited" in returned:
            return self._stopped_waiting(returned["waited"])
        return self._ended(returned["outcome"]) if returned else self._failed(*cause)

    def _prepare(self, stack: contextlib.ExitStack) -> Resources:
        """Connects to the cluster and checks it; the connection ends with `stack`."""
        cluster, loaders = self._config.cluster, self._config.data.workers
        stack.enter_context(connected(cluster, loaders))
        self._stops.listen()
        resources = request(cluster, loaders)
        self._question = make_question(self._config, self._folder, KEY, self._manifest)
        check_nodes(self._question, resources)
        self._announce(resources)
        return resources

    def _announce(self, resources: Resources) -> None:
        low = f"{resources.min_workers} to " if resources.min_workers < resources.workers else ""
        ready = duration(time.monotonic() - self._started)
        say(f"{low}{resources.workers} workers x {resources.bundle}; Ray is up after {ready}")
        where, why = resolve_where(self._config.eval.where, resources)
        say(f"evaluation {where}: {why}")
        self._facts["evaluation"] = f"{where}: {why}"
        self._config = with_where(self._config, where)

    def _desk(self, resources: Resources) -> Desk:
        """What sees to evaluations beside the training; without requests it does nothing."""
        record = self._life.record
        job = Job(self._config, self._folder.uri, record.run_uid, record.attempts)
        self._evaluations = Desk(
            RayRunner(job, resources), self._folder, self._config.train.guard.evaluate_s, self._config.checkpoint,
            lambda result: self._board.evaluated.remote(result),
        )  # fmt: skip
        return self._evaluations

    def _train(self, resources: Resources) -> tuple[dict[str, Any], tuple[str, str]]:
        """Runs worker groups until the run ends for another reason than a node that is taken away.

        Returns:
            (what rank 0 returned, or nothing when the run failed; first failure and the whole of it).
        """
        while True:
            self._board = board = open_board(self._config.cluster.max_failures)
            returned, error = self._fit(resources, board)
            if error is not None:
                first, verdict = _last_words(board)
                if verdict.refusal:
                    return {"refused": verdict.refusal, "exit": verdict.exit_code}, ("", "")
                if isinstance(error, ControllerGoneError):  # what failed before it was another failure
                    first = str(error).splitlines()[0]
                return {}, (first or root_cause(error), str(error))
            if "outcome" not in returned:
                return returned, ("", "")
            reason = str(returned.get("outcome", {}).get("stopped", ""))
            if not reason.startswith(PREEMPTED):
                return returned, ("", "")
            say(f"{reason}; a checkpoint is saved (step {returned['outcome']['step']}), and the run goes on elsewhere")
            self._life.note("preempted", reason)

    def _fit(self, resources: Resources, board: Any) -> tuple[dict[str, Any], Exception | None]:
        self._part += 1
        trainer = make_trainer(
            self._config, resources, self._folder, self._life.record, self._facts, board,
            term=self._lease.number, part=self._part, question=self._question,
        )  # fmt: skip
        waiting = Waiting(board, resources, GROUP_STARTS * start_timeout_s(self._config.cluster))
        self._stops.tell = board.stop.remote  # the board's reply is not needed
        if self._stops.reason:  # it came between two worker groups
            board.stop.remote(self._stops.reason)
        with self._shown(board):
            try:
                return _beside(lambda: trainer.fit().return_value, lambda: self._watch(board, waiting)), None
            except TrainingFailedError as error:
                return {}, waiting.verdict(error)
            except RayError as error:
                if not waiting.ended:
                    return {}, ControllerGoneError(error)
                if self._stops.reason and not waiting.refused:
                    return {"waited": self._stops.reason}, None
                return {}, waiting.verdict(None)
            finally:
                self._stops.tell = lambda _: None

    def _watch(self, board: Any, waiting: Waiting) -> None:
        """Twice a second: what ends the run from here."""
        reason = self._stops.reason
        if self._lease.lost is not None:
            reason = "the lease has passed on"
            board.stop.remote(reason)
        if waiting.over(stop=bool(reason)):
            end_controller()

    @contextlib.contextmanager
    def _shown(self, board: Any) -> Iterator[None]:
        line = ProgressLine()

        def keep(news: News) -> None:
            for wish in news.requests:
                self._evaluations.ask(wish)
            for state, reason in news.states:
                self._life.note(state, reason)
            if news.progress is not None:
                self._metrics.heard(news.progress.step)

        try:
            with background("progress", partial(watch, board, (keep, line))):
                yield
        finally:
            line.close()

    def _refused(self, reason: str, code: int) -> int:
        say(f"error: {reason}", error=True)
        if code != EXIT_HELD:  # else the run is another's by now, and so is its record
            self._end("failed", reason)
        return code

    def _failed(self, first: str, everything: str) -> int:
        key = f"failures/attempt-{self._life.record.attempts:04d}.txt"
        where = f"(all of it: {self._folder.uri}/{key})"
        try:
            for text in untold(self._folder):
                say(text, error=True)  # a hang of rank 0 that no later attempt could tell of
            self._folder.put(key, f"{first}\n\n{everything}".encode())
        except StorageError as error:
            where = f"{everything}\n(it is not kept: {error})"
        say(f"error: the run failed: {first}\n{where}", error=True)
        say("Type the same command again to resume from the last checkpoint.", error=True)
        self._end("failed", first)
        return EXIT_FAILED

    def _ended(self, outcome: dict[str, Any]) -> int:
        if outcome["stopped"]:
            self._end("stopped", outcome["stopped"])
            say(f"stopped ({outcome['stopped']}) at step {outcome['step']}. Type the same command again to resume.")
            return EXIT_OK
        self._end("finished", "", finished=True, summary=outcome)
        say(end_table(self._config, self._folder, outcome))
        return EXIT_OK

    def _stopped_waiting(self, reason: str) -> int:
        """No worker group ran, so there is nothing to save."""
        self._end("stopped", reason)
        say(f"stopped ({reason}) while no workers ran. Type the same command again to resume.")
        return EXIT_OK

    def _end(self, state: str, reason: str, **changes: Any) -> None:
        if state == "finished":
            self._enter_or_tell(state, **changes)
        else:
            self._life.note(state, reason)
        try:
            record_end(self._config, self._folder, self._life, state, reason)
        except JournalError as error:
            if state != "failed":
                raise
            say(f"error: {error}", error=True)  # what failed first decides the exit code

    def _enter_or_tell(self, state: str, **changes: Any) -> None:
        try:
            self._life.enter(state, **changes)
        except StorageError as error:
            raise EndError(
                f"the training is done, but the run's record was not written ({error}). Type the same command again "
                "once storage answers: the last checkpoint is the end of the run"
            ) from error


def _last_words(board: Any) -> tuple[str, Admission]:
    """The first failure and the verdict; nothing when the board went down with its node."""
    try:
        found: tuple[str, Admission] = ray.get(board.end.remote(), timeout=10)
    except RayError:
        return "", Admission()
    return found


def _beside(call: Callable[[], Any], meanwhile: Callable[[], None]) -> Any:
    """Runs `call` on another thread, waits for it, and does something twice a second meanwhile.

    In the main thread Ray Train would put its own handler in the place of ours, which ends a run without a checkpoint.
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # handed to the waiting thread, which raises it
            done.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    while not done.done():
        wait([done], timeout=0.5)  # a wait without end would not let signal handlers run
        meanwhile()
    return done.result()
