"""Replaying a run by name: from its directory, or from object storage when the hosts it ran on are gone."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.identity import read_identity
from orchestrator.track.journal import streams
from orchestrator.track.redact import Redactor
from orchestrator.track.sync import sync


@dataclass(frozen=True)
class Replayed:
    """What happened, in words; `complete` as `Synced.complete`."""

    name: str
    text: str
    error: str
    complete: bool


def replay(run: str, uri: str = "", endpoint: str = "", experiment: str = "", patience_s: float = 60.0) -> Replayed:
    """Ships what a run's journals hold and a server lacks.

    Args:
        run: run directory, or the run folder's URI.
        uri: of the server; "" = MLFLOW_TRACKING_URI, else, for a directory, mlflow.db beside the run.
        endpoint: of the object store; "" = the environment's.
        experiment: "" = the one that the run was recorded for.
        patience_s: how long a server that fails is tried again.

    Raises:
        ValueError: there is no recorded run, or no server is named for one on object storage.
        StorageError: storage cannot be read.
    """
    server, remote = os.environ.get("MLFLOW_TRACKING_URI", ""), "://" in run
    if remote and not (uri or server):
        raise ValueError(f"{run} is on object storage: say where to ship it, with --uri or MLFLOW_TRACKING_URI")
    with ExitStack() as scratch:
        directory = _brought(run, endpoint, scratch) if remote else Path(run).absolute()
        wanted = experiment or read_identity(directory).experiment
        config = resolve(TrackConfig(uri=uri, experiment=wanted, poll_s=0.5), directory.parent, server)
        done = sync(directory, config, patience_s)
    text = (
        f"{done.shipped} records shipped, {done.waiting} waiting, {done.refused} refused; "
        f"{Redactor().shapes(config.uri)}, run {done.run_id or '(none)'}"
    )
    if done.busy:
        text += f"\n  {done.busy} streams are being written by a running process, which ships them itself"
    return Replayed(run.rstrip("/").rsplit("/", 1)[-1], text, done.error, done.complete)


def _brought(uri: str, endpoint: str, scratch: ExitStack) -> Path:
    """The journal of a run on object storage, with the files that it names, in a directory of its own."""
    directory = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="sync-")), "run")
    committed = CommittedJournal(Folder(uri.rstrip("/"), StoreConfig(endpoint=endpoint)), directory)
    committed.restore()
    if not streams(directory):
        raise ValueError(f"{uri} holds no journal. Give the run's folder, for example s3://bucket/runs/NAME")
    committed.restore_files()
    return directory
