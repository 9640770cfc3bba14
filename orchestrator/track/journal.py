"""The append-only journal: the truth about a run, local first.

Layout under a run directory (a *stream* is what one process wrote):

    track/journal/<stream>/000001.jsonl     closed segments never change; the last one grows
    track/journal/<stream>/lock             held (flock) while its writer, or whoever ships it, is alive

A record is handed to the kernel by one `write` call, so that SIGKILL loses nothing that was recorded and at most the
last line is torn. There is no fsync: only the death of the host can lose the tail, and for that the segments are
committed to run storage with each checkpoint. `write` into the page cache of a local disk takes microseconds. A disk
error is counted and logged at once, not raised: the writer may be any thread, and whoever leads the run asks
`trouble()` and ends it in order.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from itpn_core.errors import UserError
from orchestrator.track.events import Event, Record, decode, encode

_log = logging.getLogger(__name__)
_JOURNAL = Path("track") / "journal"


class JournalError(UserError):
    """A disk does not take the records of a run."""


@dataclass(frozen=True)
class Position:
    """A place in a stream: segment number (from 1) and byte offset in it, always at the start of a line."""

    segment: int = 1
    offset: int = 0


class StreamLock:
    """Exclusive right to a stream, released by the kernel when the process dies."""

    def __init__(self, stream: Path) -> None:
        self._path = stream / "lock"
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock without waiting; False when a living process holds it."""
        if self._fd >= 0:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Journal:
    """Writer of one stream. Safe to call from several threads.

    Args:
        directory: the run directory.
        attempt: number of this start of the run, from 1; streams of later attempts sort after earlier ones.
        role: who writes ("rank0", "driver", "node1"); part of the stream's name.
        segment_bytes: size at which the next segment is begun.
    """

    def __init__(self, directory: Path, attempt: int, role: str, segment_bytes: int = 8 << 20) -> None:
        self._attempt = attempt
        self._segment_bytes = segment_bytes
        self._guard = threading.Lock()
        self._fd = -1
        self._segment = 0
        self._size = 0
        self._torn = False
        self._closed = False
        self.written = 0
        self.lost = 0
        self.last_error = ""
        name = f"a{attempt:04d}-{time.time_ns() // 1_000_000:013d}-{role}-{secrets.token_hex(4)}"
        self.stream = directory / _JOURNAL / name
        self.stream.mkdir(parents=True)
        self.lock = StreamLock(self.stream)
        self.lock.acquire()
        self._begin_segment()

    def append(self, event: Event) -> None:
        """Write one record. Takes microseconds, waits for nothing but another writer's same call."""
        now = time.time_ns() // 1_000_000
        with self._guard:
            if self._closed:
                return
            line = encode(Record(self.written + 1, now, self._attempt, event))
            try:
                self._write(line)
            except OSError as error:
                self._lose(error)
                return
            self.written += 1

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        self.last_error = str(error)
        if self.lost == 1:
            _log.error("%s", self._words())

    def _words(self) -> str:
        return (
            f"the journal of this run cannot be written: {self.stream} on {socket.gethostname()}: {self.last_error} "
            f"({self.lost} records are lost). Make room on that disk"
        )

    def trouble(self) -> str:
        """What is wrong when records were lost, and where; "" while the disk has taken all of them."""
        return self._words() if self.lost else ""

    def _write(self, line: bytes) -> None:
        if self._fd < 0 or self._size >= self._segment_bytes:
            self._begin_segment()
        if self._torn:  # an earlier write left half a line: end it, or it would swallow this record too
            line = b"\n" + line
        self._torn = True
        count = os.write(self._fd, line)
        self._size += count
        self._torn = count < len(line)
        if self._torn:
            raise OSError(f"disk took {count} of {len(line)} bytes of {self._path(self._segment)}")

    def _path(self, segment: int) -> Path:
        return self.stream / f"{segment:06d}.jsonl"

    def _begin_segment(self) -> None:
        path = self._path(self._segment + 1)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._segment, self._size, self._torn = fd, self._segment + 1, 0, False

    def close_segment(self) -> list[Path]:
        """End the current segment and return every closed segment of this stream, oldest first.

        Closed segments never change, so a committer copies those that the destination lacks.
        """
        with self._guard:
            if self._size:
                try:
                    self._begin_segment()
                except OSError as error:
                    self.last_error = str(error)
            return [self._path(number) for number in range(1, self._segment)]

    def close(self) -> None:
        """Stop writing; what comes later is not recorded. The lock stays with the follower until it is done."""
        with self._guard:
            self._closed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def streams(directory: Path) -> list[Path]:
    """Every stream of a run directory, in the order in which they were begun (attempt, then time)."""
    root = directory / _JOURNAL
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def segments(stream: Path) -> list[Path]:
    """The segment files of a stream, oldest first."""
    return sorted(stream.glob("[0-9]*.jsonl"))


@dataclass(frozen=True)
class Line:
    """What was read at one line: the record (None if it is damaged) and the position after it."""

    record: Record | None
    after: Position


def read(stream: Path, start: Position = Position()) -> Iterator[Line]:
    """Read a stream from a position to its present end, also while it is being written.

    A line without its newline is unfinished: in the last segment it may still grow, so reading ends before it; in an
    earlier segment it is damage and is yielded as a line without record.
    """
    numbers = [int(path.stem) for path in segments(stream)]
    for number in numbers:
        if number < start.segment:
            continue
        offset = start.offset if number == start.segment else 0
        with (stream / f"{number:06d}.jsonl").open("rb") as file:
            file.seek(offset)
            for raw in file:
                if not raw.endswith(b"\n") and number == numbers[-1]:
                    return
                offset += len(raw)
                if raw.strip():
                    yield Line(decode(raw), Position(number, offset))


def records(directory: Path) -> Iterator[Record]:
    """Every readable record of a run, stream by stream."""
    for stream in streams(directory):
        for line in read(stream):
            if line.record is not None:
                yield line.record


def restore_segments(directory: Path, files: Iterable[tuple[str, Path]]) -> int:
    """Put committed segments back into a run directory on another host.

    Args:
        directory: the run directory.
        files: pairs of stream name and segment file, as they were committed.

    Returns:
        How many files were copied; those already there are left alone.
    """
    count = 0
    for stream, source in files:
        target = directory / _JOURNAL / stream / source.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            count += 1
    return count
