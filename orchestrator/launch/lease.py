"""One driver per run: a lease on run storage, renewed while the driver lives.

Who owns a run is an entry of the run log (`orchestrator/checkpoint/runlog.py`); that log alone decides who may commit.
What is here decides when a newcomer may take the run at all: at once when the owner has released it or its process on
this host is gone, else when it has not renewed for `run.lease_s` by the storage's own clock.

    log/00000009.json    the owner's entry: host, process, since when, lease_s
    log/beat-00000009    written again and again by that owner; its age is the age of the lease
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from itpn_core.errors import UserError
from orchestrator.checkpoint.runlog import (
    OWNER,
    RELEASED,
    Entry,
    FencedError,
    RunLog,
    TakenError,
    describe_loss,
)
from orchestrator.data.folder import Folder, StorageError

log = logging.getLogger(__name__)
_CLOCK_S = 2.0
"""Resolution of the times that object stores keep, twice."""


class HeldError(UserError):
    """A living driver owns the run."""


class Lease:
    """The ownership of a run; a context manager that releases it.

    Args:
        folder: the run's folder.
        lease_s: how long it is good without renewal.
        holder: what to tell others about this process; None asks the system.

    Raises:
        HeldError: another driver owns the run and lives.
        StorageError: storage does not answer.
    """

    def __init__(self, folder: Folder, lease_s: float, holder: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._lease_s = lease_s
        self._log = RunLog(folder)
        self._facts = {**(holder or describe_process()), "lease_s": lease_s, "since": _moment(time.time())}
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.lost: FencedError | None = None
        """Why the run is no longer ours, once that is known."""
        self.taken_from = ""
        """A line about the owner that was replaced; "" when there was none."""
        self.number = self._last = self._take()
        """Fencing number."""
        self._thread = threading.Thread(target=self._renew_until_end, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Asks storage whether the run is still ours; call it right before writing what only the owner may.

        Raises:
            FencedError: it is not.
            StorageError: storage does not answer.
        """
        with self._lock:
            last = self._log.last(self._last)
            if last is not None:
                self._last = last.number
            if self.lost is None and (last is None or last.term != self.number):
                self.lost = FencedError(describe_loss(self._folder.uri, last))
            if self.lost is not None:
                raise self.lost

    def renew(self) -> None:
        """Proves that this driver lives; raises as `check`."""
        self.check()
        self._folder.put(_beat(self.number), json.dumps({"at": _moment(time.time())}).encode())

    def release(self) -> None:
        """Gives the run back, so that the next driver need not wait; best effort."""
        self._end.set()
        self._thread.join(timeout=30)
        with contextlib.suppress(StorageError, FencedError, FileNotFoundError):
            while True:
                self.check()
                with contextlib.suppress(TakenError):  # a last commit of our own workers came between
                    self._log.create(self._last + 1, RELEASED, self.number)
                    break

    def _take(self) -> int:
        while True:
            last = self._log.last()
            number = last.number + 1 if last else 1
            self.taken_from = self._claim(last) if last else ""
            try:
                return self._log.create(number, OWNER, number, self._facts).number
            except TakenError as taken:
                if taken.entry.author == self._log.author:  # written by a request whose answer got lost
                    return number

    def _claim(self, last: Entry) -> str:
        """Why the run may be taken although it had an owner.

        Raises:
            HeldError: it may not.
        """
        if not last.term or last.kind == RELEASED:
            return ""
        owner = self._owner(last)
        where = f"host {owner.facts['host']}, pid {owner.facts['pid']}, since {owner.facts['since']}"
        if is_gone(owner.facts):
            return f"the driver before this one ({where}) is gone; this one takes the run over"
        quiet, limit = self._quiet_seconds(owner.number, last.term), float(owner.facts["lease_s"])
        if quiet > limit + _CLOCK_S:
            return (
                f"the driver before this one ({where}) has not renewed its lease for {quiet:.0f} s (run.lease_s="
                f"{limit:g}); this one takes the run over"
            )
        left = max(0.0, limit + _CLOCK_S - quiet)
        job = f", job {owner.facts['job']}" if owner.facts.get("job") else ""
        raise HeldError(
            f"run {self._folder.uri.rsplit('/', 1)[-1]} is held by a driver on {where}{job}; its lease ends at "
            f"{_moment(time.time() + left)} unless it is renewed. Stop it there (Ctrl-C, or ray job stop), wait for it,"
            " or give another run.name"
        )

    def _owner(self, last: Entry) -> Entry:
        """The owner's entry. Where it is gone, the last one with an owner of whom nothing is known.

        Such an owner is waited for as one of this `run.lease_s`. One that lives has its beat, and if it is taken for
        dead all the same, it can commit nothing more.
        """
        try:
            return self._log.entry(last.term)
        except FileNotFoundError:
            facts = {"host": "unknown", "pid": "unknown", "since": "unknown", "lease_s": self._lease_s}
            return replace(last, facts=facts)

    def _quiet_seconds(self, entry: int, owner: int) -> float:
        """How long an owner has been silent, by the one clock that both sides share: the storage's.

        Args:
            entry: number of an entry that it wrote.
            owner: its own number.
        """
        renewed = self._folder.modified(f"log/{entry:08d}.json")
        with contextlib.suppress(FileNotFoundError):
            renewed = max(renewed, self._folder.modified(_beat(owner)))
        probe = f"log/clock-{uuid.uuid4().hex}"
        self._folder.put(probe, b"")
        now = self._folder.modified(probe)
        self._folder.delete([probe])
        return now - renewed

    def _renew_until_end(self) -> None:
        while not self._end.wait(self._lease_s / 4):
            try:
                self.renew()
            except FencedError:
                return
            except Exception as error:  # whatever it is, the lease runs out without a next try
                log.warning("the lease was not renewed, next try in %.0f s: %s", self._lease_s / 4, error)


def describe_process(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process, as others can recognise it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "birth": _birth(os.getpid()),
        "boot": _boot(),
        "pids": _pid_space(),
        "job": _submission(environment),
    }


def is_gone(facts: Mapping[str, Any]) -> bool:
    """Whether a process that ran under this very kernel and among these very process numbers has ended.

    False when it cannot be known, as for processes of other hosts and containers.
    """
    here = facts.get("boot") == _boot() != "" and facts.get("pids") == _pid_space() != ""
    return here and _birth(int(facts["pid"])) != facts.get("birth")


def _birth(pid: int) -> str:
    """When a process was born, in the kernel's ticks; "" when there is none, or only what is left of one."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return ""
    return "" if after_name[0] in "ZX" else after_name[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    """Which process numbers this process sees: containers on one host have their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _submission(environment: Mapping[str, str]) -> str:
    """Name of the Ray job that this process is the driver of, "" when it is none."""
    try:
        settings = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(settings.get("metadata", {}).get("job_submission_id", ""))
    except (ValueError, AttributeError):
        return ""


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _beat(number: int) -> str:
    return f"log/beat-{number:08d}"
