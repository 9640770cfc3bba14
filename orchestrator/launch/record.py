"""A run's identity on its storage: name, the settings that affect its result, and whether it has finished."""

from __future__ import annotations

import json
import logging
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.checkpoint.runlog import FencedError
from orchestrator.config.errors import SettingError
from orchestrator.data.folder import Folder, StorageError
from orchestrator.launch.lease import Lease

log = logging.getLogger(__name__)
KEY = "run.json"
_HISTORY = 200


@dataclass(frozen=True)
class RunRecord:
    """What `<run>/run.json` holds."""

    run_uid: str
    fields: dict[str, Any]
    attempts: int = 0
    finished: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    """Numbers of the end table, once finished."""
    state: str = ""
    """starting, running, resumed, preempted, stopped, finished or failed."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The states in the order in which they were entered: state, at (UTC), attempt and, where there is one, reason."""

    def save(self, folder: Folder) -> None:
        """Writes the record, replacing the previous one."""
        folder.put(KEY, json.dumps(asdict(self), indent=1, sort_keys=True).encode())

    def next_attempt(self) -> RunRecord:
        """The record of one more start of the same run."""
        return replace(self, attempts=self.attempts + 1)

    def entered(self, state: str, reason: str = "") -> RunRecord:
        """The record with one more state in its history."""
        entry: dict[str, Any] = {"state": state, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        entry["attempt"] = self.attempts
        if reason:
            entry["reason"] = reason
        return replace(self, state=state, history=[*self.history, entry][-_HISTORY:])


class Lifecycle:
    """The record of a run that this driver owns; every change of state is written down, if the run is still ours.

    Args:
        folder: the run's folder.
        record: as stored, with this attempt counted.
        lease: what makes the run ours.
    """

    def __init__(self, folder: Folder, record: RunRecord, lease: Lease) -> None:
        self._folder = folder
        self._lease = lease
        self.record = record

    def enter(self, state: str, reason: str = "", **changes: Any) -> None:
        """Enters a state.

        Args:
            state: its name.
            reason: why, where that is worth keeping.
            changes: other fields of the record that change with it.

        Raises:
            FencedError: another driver has the run; nothing was written.
            StorageError: storage does not answer.
        """
        self.record = replace(self.record.entered(state, reason), **changes)
        self._lease.check()
        self.record.save(self._folder)

    def note(self, state: str, reason: str = "") -> None:
        """As `enter` while a run goes on, which no trouble of storage may end: the next change is written instead."""
        try:
            self.enter(state, reason)
        except (StorageError, FencedError) as error:
            log.warning("state %s was not written down: %s", state, error)

    def story(self) -> str:
        """States of this attempt in one line."""
        mine = [entry for entry in self.record.history if entry["attempt"] == self.record.attempts]
        return ", ".join(f"{entry['state']} {entry['at'][11:19]}" for entry in mine)


def _read(body: bytes) -> RunRecord:
    found = RunRecord(**json.loads(body))
    if not (isinstance(found.fields, dict) and isinstance(found.history, list) and isinstance(found.attempts, int)):
        raise ValueError("its entries are not those of a run")
    return found


def open_record(folder: Folder, fields: dict[str, Any], name: str) -> RunRecord:
    """The record of this run name: the stored one when its fields are equal, else a new one.

    Raises:
        SettingError: the name was used with other settings; all differing keys are listed. Or the record is damaged.
    """
    try:
        stored = _read(folder.get(KEY))
    except FileNotFoundError:
        return RunRecord(run_uid=uuid.uuid4().hex, fields=fields)
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"{folder.uri}/{KEY} is damaged ({error}): nobody can say which settings this run has. Put back an earlier "
            "version of that object, or give another run.name; the checkpoints beside it are untouched"
        ) from error
    differing = [
        f"{key}: was {stored.fields.get(key, '(absent)')!r}, now {fields.get(key, '(absent)')!r}"
        for key in sorted(stored.fields.keys() | fields.keys())
        if stored.fields.get(key) != fields.get(key)
    ]
    if differing:
        raise SettingError(
            f"run.name={name!r} exists in {folder.uri} with other settings:\n  "
            + "\n  ".join(differing)
            + "\nGive another run.name (or none: a name is made from the settings), or restore these settings."
        )
    return stored
