"""The end of a run: the table that a person reads, and the state that the tracking server shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import Folder, StorageError
from orchestrator.launch.place import local_directory
from orchestrator.launch.record import Lifecycle
from orchestrator.launch.say import say
from orchestrator.launch.show import duration, table
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.environment import working_diff
from orchestrator.track.journal import JournalError
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import Redactor, secret_values

# The run states that MLflow knows; "stopped" on request is its KILLED.
MLFLOW_STATE = {"finished": "finished", "failed": "failed", "stopped": "killed"}


def record_end(config: JobConfig, folder: Folder, life: Lifecycle, state: str, reason: str) -> None:
    """Tells the tracking server how the run ended; says where the backlog is when the server does not answer.

    Raises:
        JournalError: the local disk did not take what there was to tell.
    """
    try:
        _record_end(config, folder, life, state, reason)
    except OSError as error:
        raise JournalError(f"the end of the run ({state}) was not written to its journal: {error}") from error


def _record_end(config: JobConfig, folder: Folder, life: Lifecycle, state: str, reason: str) -> None:
    record = life.record
    recorder = Recorder(
        config.track,
        record.run_uid,
        local_directory(folder, record.run_uid),
        record.attempts,
        name=config.run.name,
        role="driver",
        secrets=secret_values(os.environ),
        follow=config.track.follow,
        storage=folder.remote(),
    )
    recorder.tags({"run.state": state, "run.reason": reason, "run.states": life.story()})
    diff = working_diff()
    if diff:
        recorder.text("git.diff", diff)
    recorder.state(MLFLOW_STATE[state], reason)
    tell_story(recorder, folder)
    segments = recorder.close_segment()
    backlog = recorder.close()
    if trouble := recorder.trouble():
        raise JournalError(f"the end of the run ({state}) is not whole in its journal: {trouble}")
    if config.track.follow and not backlog.empty:
        say(f"warning: {backlog}")
        keep(folder, recorder, segments)


def keep(folder: Folder, recorder: Recorder, segments: list[Path]) -> None:
    """Takes to run storage what the server lacks: this host's disk may go with the job."""
    committed = CommittedJournal(folder, recorder.directory)
    try:
        committed.commit(segments)
        committed.keep_files()
    except StorageError as error:
        say(f"warning: the end of the journal is only in {recorder.directory}: {error}")


def tell_story(recorder: Recorder, folder: Folder) -> None:
    """Keeps the report and the journals it is made from, wherever rank 0 ran."""
    try:
        CommittedJournal(folder, recorder.directory).restore()
    except StorageError as error:
        say(f"warning: report.html lacks what is only in run storage: {error}")
    recorder.report()
    recorder.journals()


def end_table(config: JobConfig, folder: Folder, outcome: dict[str, Any]) -> str:
    """What a run achieved, in about ten lines."""
    rows = [
        ("run", config.run.name),
        ("files", folder.uri),
        ("tracking", Redactor().shapes(config.track.uri)),
        (
            "steps",
            f"{outcome['step']} of {config.train.global_batch} images, {duration(outcome['seconds'])} of training",
        ),
        ("loss", f"{outcome['first_loss']:.4f} -> {outcome['last_loss']:.4f}"),
        ("images/s", f"{outcome['images_per_second']:.0f}"),
        ("time of all ranks", outcome["goodput"]),
    ]
    if outcome.get("beside"):  # runs of earlier versions have no such entry
        rows.append(("evaluations beside", outcome["beside"]))
    if outcome["mfu"]:
        rows.append(("utilisation", f"{100 * outcome['mfu']:.1f} % of the devices' peak (MFU)"))
    if outcome["restarts"]:
        rows.append(("restarts", f"{outcome['restarts']}, {outcome['redone_steps']} steps done again"))
    rows += [(name, _accuracy(*value)) for name, value in outcome["scores"].items()]
    rows += [("difference", line) for line in outcome["differences"]]
    rows.append(("protocol", outcome["protocol"]))
    rows.append(("see it", "make ui"))
    return table(rows)


def _accuracy(top1: float, standard_error: float) -> str:
    return f"{100 * top1:.2f} % +- {100 * standard_error:.2f} (standard error)"
