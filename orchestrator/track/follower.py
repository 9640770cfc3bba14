"""Ships a run's journals to MLflow: behind the run if it must be, never in its way.

The queue is the journal itself: at most `queue_bound` metric points are in memory, the rest waits on disk. A cursor per
stream and target says what was shipped; it is an optimisation, for the server is asked what it holds wherever the
cursor is missing, stale, or belongs to another run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.track.client import RefusedError, RunLostError, UnreachableError
from orchestrator.track.config import TrackConfig
from orchestrator.track.events import Metrics, Record
from orchestrator.track.journal import Position, StreamLock, read, segments, streams
from orchestrator.track.server import Server

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Consecutive records of one stream: metrics together, anything else alone."""

    records: list[Record]
    after: Position
    points: int = 0
    damaged: int = 0


def next_batch(stream: Path, start: Position, bound: int) -> Batch:
    """The next records of a stream, at most `bound` metric points (one record may exceed it by itself)."""
    batch = Batch([], start)
    for line in read(stream, start):
        record = line.record
        if record is None:
            batch.damaged += 1
        elif isinstance(record.event, Metrics):
            if batch.records and batch.points + len(record.event.values) > bound:
                break
            batch.records.append(record)
            batch.points += len(record.event.values)
        elif batch.records:
            break
        else:
            batch.records.append(record)
            batch.after = line.after
            break
        batch.after = line.after
    return batch


class Cursor:
    """What of one stream one target has. Kept beside the stream; replaced atomically, never fsynced."""

    def __init__(self, stream: Path, target: str) -> None:
        self._path = stream / f"cursor-{target}.json"
        self.run_id = ""
        self.position = Position()
        try:
            held = json.loads(self._path.read_text())
            self.position = Position(int(held["segment"]), int(held["offset"]))
            self.run_id = str(held["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            self.position = Position()

    def move(self, run_id: str, position: Position) -> None:
        """Remember that everything before a position is on the server."""
        self.run_id, self.position = run_id, position
        body = {"run_id": run_id, "segment": position.segment, "offset": position.offset}
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(body))
            draft.replace(self._path)
        except OSError as error:  # a lost cursor costs a replay, nothing else
            _log.debug("cursor of %s not written: %s", self._path.parent.name, error)


class Shipper:
    """Moves records from the streams of one run directory to a server, one batch per call.

    Args:
        directory: the run directory.
        server: the target.
        config: settings.
        own: the stream written by this process; it is shipped although its writer lives.
    """

    def __init__(self, directory: Path, server: Server, config: TrackConfig, own: Path | None = None) -> None:
        self._directory = directory
        self._server = server
        self._bound = config.queue_bound
        self._own = own
        self._target = hashlib.sha256(config.uri.encode()).hexdigest()[:12]
        self._cursors: dict[Path, Cursor] = {}
        self._locks: dict[Path, StreamLock] = {}
        self.shipped = 0
        self.refused = 0
        self.damaged = 0
        self.peak_points = 0
        self.last_ms = 0

    def step(self) -> bool:
        """Ship one batch of the oldest stream that has one. False when nothing is waiting.

        Raises:
            UnreachableError: the server does not take it now; nothing is lost, call again.
        """
        try:
            run_id = self._server.connect()
            return any(self._ship_from(stream, run_id) for stream in self._takeable())
        except RunLostError as error:
            self._server.forget()
            raise UnreachableError(f"the run is gone from the server and will be made again: {error}") from error

    def _takeable(self) -> list[Path]:
        """Our own stream and those whose writer is dead; of these, the lock is ours from now on."""
        found = []
        for stream in streams(self._directory):
            if stream != self._own and stream not in self._locks:
                lock = StreamLock(stream)
                if not lock.acquire():
                    continue
                self._locks[stream] = lock
            found.append(stream)
        return found

    def cursor(self, stream: Path) -> Cursor:
        """The cursor of a stream for this target."""
        if stream not in self._cursors:
            self._cursors[stream] = Cursor(stream, self._target)
        return self._cursors[stream]

    def _ship_from(self, stream: Path, run_id: str) -> bool:
        cursor = self.cursor(stream)
        if cursor.run_id not in ("", run_id):
            cursor.position = Position()  # another database holds another run: it needs everything
        batch = next_batch(stream, cursor.position, self._bound)
        if batch.after == cursor.position:
            return False
        self.peak_points = max(self.peak_points, batch.points)
        self._send(batch.records)
        self.shipped += len(batch.records)
        self.damaged += batch.damaged
        if batch.records:
            self.last_ms = batch.records[-1].ms
        cursor.move(run_id, batch.after)
        return True

    def _send(self, batch: list[Record]) -> None:
        """Send a batch; when the server refuses it, send its records singly and set aside those at fault."""
        try:
            self._server.ship(batch)
        except RefusedError as error:
            if len(batch) > 1:
                for record in batch:
                    self._send([record])
                return
            self.refused += 1
            reason = self._server.explain(error)
            _log.warning("MLflow refused record %d: %s", batch[0].seq, reason)
            self._note_refusal(batch[0], reason)

    def _note_refusal(self, record: Record, reason: str) -> None:
        line = {"seq": record.seq, "attempt": record.attempt, "kind": type(record.event).__name__, "reason": reason}
        with (self._directory / "track" / "refused.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self) -> bool:
        """Last act of a follower that shipped everything: no second run may stay behind."""
        if self._server.identity.creates:
            self._server.remove_ghosts()
        return True

    def explain(self, error: BaseException) -> str:
        """One line about an error, without credentials."""
        return self._server.explain(error)

    def waiting(self) -> int:
        """Records of all streams that the target does not have yet (counted from the files)."""
        total = 0
        for stream in streams(self._directory):
            position = self.cursor(stream).position
            for path in segments(stream):
                number = int(path.stem)
                if number >= position.segment:
                    total += _count_lines(path, position.offset if number == position.segment else 0)
        return total

    def close(self) -> None:
        """Give back the streams of the dead."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()


def _count_lines(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


class Follower(threading.Thread):
    """Runs a Shipper on its own daemon thread, with back-off while the server fails.

    Args:
        shipper: what to run.
        config: pauses and intervals.
        on_lag: called about every `lag_every_s` with (seconds behind, failures in a row).
    """

    def __init__(self, shipper: Shipper, config: TrackConfig, on_lag: Callable[[float, int], None]) -> None:
        super().__init__(name="mlflow-follower", daemon=True)
        self._shipper = shipper
        self._config = config
        self._on_lag = on_lag
        self._wake = threading.Event()
        self._deadline = float("inf")
        self._next_lag = time.monotonic() + config.lag_every_s
        self.failures = 0
        self.last_error = ""

    def run(self) -> None:
        """Ship until `finish` was called and everything is there, or its time is over."""
        try:
            while time.monotonic() < self._deadline:
                moved = bool(self._try(self._shipper.step))
                closing = self._deadline != float("inf")
                if closing and not moved and not self.failures and self._try(self._shipper.settle):
                    return
                self._tell_lag(moved)
                if not moved:
                    self._wake.wait(self._pause(closing))
        except Exception:
            _log.exception("the MLflow follower stopped; records stay in the journal")
        finally:
            self._shipper.close()

    def _try(self, call: Callable[[], bool]) -> bool | None:
        """The call's answer, None when it failed."""
        try:
            answer = call()
        except Exception as error:  # whatever it is, it may not end the thread: the journal holds the records
            self.failures += 1
            self.last_error = self._shipper.explain(error)
            if self.failures == 1:
                _log.warning("MLflow does not take records (they wait in the journal): %s", self.last_error)
            return None
        if self.failures:
            _log.warning("MLflow takes records again after %d failed tries", self.failures)
        self.failures, self.last_error = 0, ""
        return answer

    def _pause(self, closing: bool) -> float:
        if not self.failures:
            return self._config.poll_s
        longest = min(1.0, self._config.backoff_max_s) if closing else self._config.backoff_max_s
        pause = min(longest, self._config.poll_s * 2.0 ** min(self.failures - 1, 16)) * random.uniform(0.75, 1.0)
        return min(pause, max(0.0, self._deadline - time.monotonic()))

    def _tell_lag(self, moved: bool) -> None:
        now = time.monotonic()
        if now < self._next_lag:
            return
        self._next_lag = now + self._config.lag_every_s
        behind = 0.0
        if (moved or self.failures) and self._shipper.last_ms:
            behind = max(0.0, time.time() - self._shipper.last_ms / 1000)
        self._on_lag(behind, self.failures)

    def finish(self, timeout: float) -> None:
        """Ship the rest, for at most `timeout` seconds, and wait for it."""
        self._deadline = time.monotonic() + timeout
        self._wake.set()
        self.join(timeout + 0.5)
