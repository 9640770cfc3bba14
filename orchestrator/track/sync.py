"""Replay of journals by hand: everything a run directory holds and a server lacks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.track.client import UnreachableError
from orchestrator.track.config import TrackConfig
from orchestrator.track.follower import Shipper
from orchestrator.track.identity import read_identity
from orchestrator.track.journal import StreamLock, streams
from orchestrator.track.redact import Redactor
from orchestrator.track.server import RunIdentity, Server


@dataclass(frozen=True)
class Synced:
    """What a replay did.

    Attributes:
        shipped: records sent (those the server held already are sent too, and change nothing).
        waiting: records still not there.
        refused: records the server will never take.
        busy: streams whose writer is alive and ships them itself.
        run_id: the MLflow run.
        error: why it stopped early, "" when it did not.
    """

    shipped: int
    waiting: int
    refused: int
    busy: int
    run_id: str
    error: str

    @property
    def complete(self) -> bool:
        """Whether the server holds everything that is not still being written."""
        return not (self.error or self.refused or (self.waiting and not self.busy))


def sync(directory: Path, config: TrackConfig, patience_s: float = 60.0) -> Synced:
    """Ship what a run's journals hold; a server that fails is tried again for `patience_s` seconds.

    Raises:
        ValueError: the directory holds no recorded run.
    """
    identity = read_identity(directory)
    known = RunIdentity(identity.run_uid, identity.name, identity.begun_ms, parent_uid=identity.parent_uid)
    server = Server(config, known, directory, Redactor())
    shipper = Shipper(directory, server, config)
    error, until = "", time.monotonic() + patience_s
    while True:
        try:
            if not shipper.step():
                shipper.settle()
                error = ""
                break
            until = time.monotonic() + patience_s
        except UnreachableError as failure:
            error = shipper.explain(failure)
            if time.monotonic() > until:
                break
            time.sleep(min(1.0, config.poll_s))
    shipper.close()
    busy = sum(not _free(stream) for stream in streams(directory))
    return Synced(shipper.shipped, shipper.waiting(), shipper.refused, busy, server.run_id, error)


def _free(stream: Path) -> bool:
    lock = StreamLock(stream)
    free = lock.acquire()
    lock.release()
    return free
