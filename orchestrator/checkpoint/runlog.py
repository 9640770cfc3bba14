"""Who may commit to a run: one numbered line of entries on run storage, decided without clocks and without locks.

    log/00000001.json   owner     a driver took the run
    log/00000002.json   writer    a worker group of that driver started
    log/00000003.json   commit    that group commits a checkpoint
    log/00000009.json   owner     another driver took the run: whoever had it before is out

Every entry is created only if its number is free (`If-None-Match: *` in a bucket, a hard link on a disk), which is the
one conditional write that all stores make atomic. A writer may only use the number after the last entry it knows, so an
entry of somebody else in that place ends its right to commit, however long it slept before. Numbers are never given
again: nothing here is deleted. The number of an owner's or writer's entry is its fencing number.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from itpn_core.errors import UserError
from orchestrator.data.errors import DataError
from orchestrator.data.folder import Folder, StorageError

OWNER, WRITER, COMMIT, RELEASED = "owner", "writer", "commit", "released"
_WATCH_S = 10.0


class FencedError(UserError):
    """Somebody else has the run now: nothing more may be committed here."""


class TakenError(Exception):
    """The number belongs to another entry."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(f"entry {entry.number} is {entry.kind} of {entry.author}")
        self.entry = entry


@dataclass(frozen=True)
class Entry:
    """One entry."""

    number: int
    kind: str
    term: int
    """Number of the owner's entry under which it was written; 0 = nobody owns the run."""
    author: str
    facts: dict[str, Any] = field(default_factory=dict)


class RunLog:
    """Reads and appends entries of one run.

    Args:
        folder: the run's folder.
        author: tells the entries of one process and purpose from those of all others; "" makes one up.
    """

    def __init__(self, folder: Folder, author: str = "") -> None:
        self.folder = folder
        self.author = author or uuid.uuid4().hex

    def entry(self, number: int) -> Entry:
        """One entry; raises as `Folder.get`."""
        body = json.loads(self.folder.get(_key(number)))
        return Entry(number, body["kind"], body["term"], body["author"], body["facts"])

    def last(self, known: int = 0) -> Entry | None:
        """The newest entry, None when there is none or the known one is gone.

        Args:
            known: an entry that existed; looking goes on from there instead of listing all.

        Raises:
            StorageError: storage does not answer, or lists an entry that it does not hand out.
        """
        number = known or self._listed()
        while self.exists(number + 1):
            number += 1
        if not number:
            return None
        try:
            return self.entry(number)
        except FileNotFoundError as error:
            if self._listed() < number:
                return None
            raise StorageError(f"{error} is listed, but storage says that it is not there") from error

    def _listed(self) -> int:
        """Number of the newest entry, 0 when there is none."""
        names = [name for name in self.folder.names("log") if name.endswith(".json")]
        return int(names[-1].removesuffix(".json")) if names else 0

    def exists(self, number: int) -> bool:
        """Whether an entry has this number."""
        return self.folder.exists(_key(number))

    def create(self, number: int, kind: str, term: int, facts: Mapping[str, Any] | None = None) -> Entry:
        """Writes an entry under a free number.

        Raises:
            TakenError: the number is not free. It may carry an entry of this very author, written by a request whose
                answer got lost.
            StorageError: storage does not answer; the entry may exist nevertheless.
        """
        token = uuid.uuid4().hex
        entry = Entry(number, kind, term, self.author, dict(facts or {}))
        body = {"kind": kind, "term": term, "author": self.author, "facts": entry.facts, "token": token}
        written = self.folder.put(_key(number), json.dumps(body, sort_keys=True).encode(), only_if_absent=True)
        # The client repeats a request whose answer got lost, and then finds its own entry.
        if not written and json.loads(self.folder.get(_key(number)))["token"] != token:
            raise TakenError(self.entry(number))
        return entry


class Writer:
    """A worker group's right to commit, held by its rank 0.

    Args:
        folder: the run's folder.
        term: number of the driver's entry; 0 when nobody owns the run, then the newest group has the right.
    """

    def __init__(self, folder: Folder, term: int = 0) -> None:
        self._log = RunLog(folder)
        self._term = term
        self._last = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self.number = 0
        """Fencing number of this group; 0 before `begin`."""
        self.lost: FencedError | None = None
        """Why the right is gone, once that is known."""

    def begin(self) -> None:
        """Ends the right of every group before this one.

        Raises:
            FencedError: the driver that started this group does not own the run any more.
        """
        known = self._term
        while not self.number:
            last = self._log.last(known)
            if self._term and (last is None or last.term != self._term or last.kind == RELEASED):
                raise self._fenced(last)
            place = last.number + 1 if last else 1
            try:
                self._log.create(place, WRITER, self._term)
            except TakenError as taken:
                if taken.entry.author != self._log.author:
                    known = taken.entry.number
                    continue
            self._last = self.number = place
        threading.Thread(target=self._watch, name="run-log", daemon=True).start()

    def commit(self, step: int) -> None:
        """Writes down that the checkpoint of `step` is committed; nothing is, unless this succeeds.

        Raises:
            FencedError: somebody else has the run, or a newer group of the same driver.
            StorageError: storage does not answer.
        """
        with self._lock:
            while True:
                try:
                    self._log.create(self._last + 1, COMMIT, self._term, {"step": step, "fence": self.number})
                except TakenError as taken:
                    if taken.entry.author != self._log.author:
                        raise self._fenced(taken.entry) from None
                    self._last += 1  # an earlier commit of ours, whose answer got lost
                    continue
                self._last += 1
                return

    def close(self) -> None:
        """Ends the watching thread."""
        self._end.set()

    def _watch(self) -> None:
        """Learns of a successor before the next commit, which may be hours away."""
        while not self._end.wait(_WATCH_S) and self.look() is None:
            pass

    def look(self) -> FencedError | None:
        """Why the right is gone, None while it is not; asks storage."""
        with self._lock:
            try:
                found = self._log.entry(self._last + 1) if self._log.exists(self._last + 1) else None
            except (DataError, FileNotFoundError):
                found = None  # storage in trouble says nothing about who has the run
            if found is not None and found.author != self._log.author:
                self._fenced(found)
            return self.lost

    def _fenced(self, entry: Entry | None) -> FencedError:
        self.lost = FencedError(describe_loss(self._log.folder.uri, entry))
        return self.lost


def describe_loss(uri: str, entry: Entry | None) -> str:
    """What to tell whoever lost a run, and what to do."""
    if entry is None:
        return f"{uri}: the record of its owner (log/) is gone, so nothing may be committed; was the folder deleted?"
    if entry.kind == WRITER:
        return (
            f"{uri}: a newer worker group of this run has started (entry {entry.number}); this one commits nothing more"
        )
    if entry.kind == RELEASED:
        return (
            f"{uri}: the driver of this worker group has ended (entry {entry.number}); the group commits nothing more"
        )
    who = entry.facts.get("host", "unknown"), entry.facts.get("pid", "?"), entry.facts.get("since", "unknown")
    return (
        f"{uri}: this driver's lease has passed on (to host {who[0]}, pid {who[1]}, since {who[2]}; fencing number "
        f"{entry.term}), so nothing more is committed from here. The run goes on there: nothing has to be done"
    )


def _key(number: int) -> str:
    return f"log/{number:08d}.json"
