"""The driver of a training run: checks first, then Ray Train, then the end table."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.board import open_board, watch
from orchestrator.launch.check import check
from orchestrator.launch.cli import EXIT_FAILED, EXIT_OK
from orchestrator.launch.cluster import Resources, connected, request
from orchestrator.launch.finish import end_table, record_end
from orchestrator.launch.place import local_directory
from orchestrator.launch.record import RunRecord, open_record
from orchestrator.launch.show import ProgressLine, duration
from orchestrator.launch.worker import Assignment, train_worker
from orchestrator.track.environment import driver_facts
from orchestrator.train.hangs import untold


def pretrain(config: JobConfig, recipe: str) -> int:
    """Runs one training; returns the exit code (docs/training.md lists them)."""
    started = time.monotonic()
    checked = check(config)
    fields = {**result_fields(config, checked.manifest.fingerprint), **checked.inputs}
    name = config.run.name or f"{recipe}-{fingerprint(fields)[:8]}"
    config = replace(config, run=replace(config.run, name=name))
    folder = Folder(f"{config.run.storage}/{name}", config.data.store)
    record = open_record(folder, fields, name)
    if record.finished:
        print(f"run {name} is finished already; nothing to do. A new run needs another run.name or other settings.")
        print(end_table(config, folder, record.summary))
        return EXIT_OK
    record = record.next_attempt()
    record.save(folder)
    print(f"run {name} ({'start' if record.attempts == 1 else f'attempt {record.attempts}'})  in {folder.uri}")
    facts = {"recipe": recipe, **driver_facts()}
    with connected(config.cluster):
        resources = request(config.cluster)
        print(
            f"{resources.workers} workers x {resources.bundle}; Ray is up after {duration(time.monotonic() - started)}"
        )
        returned, error = _fit(config, resources, folder, record, facts)
    if returned is None:
        return _failed(config, folder, record, error)
    if "refused" in returned:
        record_end(config, folder, record, "failed", returned["refused"])
        print(f"error: {returned['refused']}", file=sys.stderr)
        return int(returned["exit"])
    return _ended(config, folder, record, returned["outcome"])


def _fit(
    config: JobConfig, resources: Resources, folder: Folder, record: RunRecord, facts: dict[str, str]
) -> tuple[dict[str, Any] | None, TrainingFailedError | None]:
    board = open_board()
    trainer = make_trainer(config, resources, folder, record, facts, board)
    with _shown(board), _stop_signals(board):
        try:
            return _beside(lambda: trainer.fit().return_value), None
        except TrainingFailedError as error:
            return None, error


def make_trainer(
    config: JobConfig,
    resources: Resources,
    folder: Folder,
    record: RunRecord,
    facts: dict[str, str],
    board: Any,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """The Ray Train run of one attempt.

    Args:
        config: resolved configuration.
        resources: of each worker.
        folder: the run's.
        record: of the run, with this attempt counted.
        facts: what only the driver knows, for the run's tags.
        board: the noticeboard between driver and rank 0.
        callbacks: told of every report, in Ray Train's controller.
    """
    assignment = Assignment(config, folder.uri, record.run_uid, record.attempts, board, facts)
    return TorchTrainer(
        train_worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=bool(resources.gpus), resources_per_worker=resources.bundle
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        run_config=RunConfig(
            # Ray's own record of the start stays on the driver's host, where its controller runs: what is resumed from
            # is our committed checkpoint on run storage, so Ray needs no storage that every host reaches.
            name=f"ray-{record.attempts:04d}",
            storage_path=str(local_directory(folder, record.run_uid) / "ray"),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures, controller_failure_limit=3),
            callbacks=list(callbacks),
        ),
    )


def _beside(call: Callable[[], Any]) -> Any:
    """Runs `call` on another thread and waits for it.

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
    return done.result()


@contextlib.contextmanager
def _shown(board: Any) -> Iterator[None]:
    line, done = ProgressLine(), threading.Event()
    thread = threading.Thread(target=watch, args=(board, line, done), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=15)
        line.close()


@contextlib.contextmanager
def _stop_signals(board: Any) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: save and end. Second: end at once."""
    seen: list[int] = []

    def handle(number: int, _frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"\n{name}: saving a checkpoint and stopping; once more to stop at once", file=sys.stderr, flush=True)
        # A signal handler must not wait, and the board's reply is not needed.
        board.stop.remote(name)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _failed(config: JobConfig, folder: Folder, record: RunRecord, error: TrainingFailedError | None) -> int:
    cause = root_cause(error)
    for text in untold(folder):
        print(text, file=sys.stderr)  # a hang of rank 0 that no later attempt could tell of
    key = f"failures/attempt-{record.attempts:04d}.txt"
    folder.put(key, str(error).encode())
    print(f"error: the run failed: {cause}\n(all of it: {folder.uri}/{key})", file=sys.stderr)
    print("Type the same command again to resume from the last checkpoint.", file=sys.stderr)
    record_end(config, folder, record, "failed", cause)
    return EXIT_FAILED


def _ended(config: JobConfig, folder: Folder, record: RunRecord, outcome: dict[str, Any]) -> int:
    if outcome["stopped"]:
        record_end(config, folder, record, "stopped", outcome["stopped"])
        print(f"stopped ({outcome['stopped']}) at step {outcome['step']}. Type the same command again to resume.")
        return EXIT_OK
    replace(record, finished=True, summary=outcome).save(folder)
    record_end(config, folder, record, "finished", "")
    print(end_table(config, folder, outcome))
    return EXIT_OK


def root_cause(error: BaseException | None) -> str:
    """The first failing rank's own words, not Ray's wrapping."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(failures.items())
        return f"rank {rank}: {_last_line(first)}"
    return _last_line(error)


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
