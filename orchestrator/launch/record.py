"""A run's identity on its storage: name, the settings that affect its result, and whether it has finished."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.config.errors import SettingError
from orchestrator.data.folder import Folder

KEY = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What `<run>/run.json` holds."""

    run_uid: str
    fields: dict[str, Any]
    attempts: int = 0
    finished: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    """Numbers of the end table, once finished."""

    def save(self, folder: Folder) -> None:
        """Writes the record, replacing the previous one."""
        folder.put(KEY, json.dumps(asdict(self), indent=1, sort_keys=True).encode())

    def next_attempt(self) -> RunRecord:
        """The record of one more start of the same run."""
        return replace(self, attempts=self.attempts + 1)


def open_record(folder: Folder, fields: dict[str, Any], name: str) -> RunRecord:
    """The record of this run name: the stored one when its fields are equal, else a new one.

    Raises:
        SettingError: the name was used with other settings; all differing keys are listed.
    """
    try:
        stored = RunRecord(**json.loads(folder.get(KEY)))
    except FileNotFoundError:
        return RunRecord(run_uid=uuid.uuid4().hex, fields=fields)
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
