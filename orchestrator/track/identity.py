"""Who a run is: the record beside its journal, by which `jobs/sync_runs.py` and reports know it without its process."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

PLACE = Path("track") / "run.json"
"""Where it lies in a run directory, and in a run folder on storage."""


@dataclass(frozen=True)
class Identity:
    """What `track/run.json` says of a run.

    Attributes:
        run_uid: our own identifier, made once.
        name: readable name.
        experiment: of MLflow.
        begun_ms: when the run began, ms since the epoch.
        parent_uid: `run_uid` of the run under which this one is shown; "" for none.
    """

    run_uid: str
    name: str
    experiment: str
    begun_ms: int
    parent_uid: str = ""


def write_identity(directory: Path, run_uid: str, name: str, experiment: str, parent_uid: str) -> int:
    """Leaves the record in a run's directory, unless one is there; returns when the run began (ms since the epoch)."""
    path = directory / PLACE
    with contextlib.suppress(OSError, ValueError, KeyError):  # not there yet, or damaged: written anew
        return int(json.loads(path.read_text())["begun_ms"])
    begun_ms = time.time_ns() // 1_000_000
    body = {"run_uid": run_uid, "name": name, "experiment": experiment, "begun_ms": begun_ms}
    if parent_uid:
        body["parent_uid"] = parent_uid
    path.write_text(json.dumps(body) + "\n")
    return begun_ms


def read_identity(directory: Path) -> Identity:
    """The run's identity, as its recorder left it.

    Raises:
        ValueError: the directory holds no recorded run.
    """
    path = directory / PLACE
    try:
        found = json.loads(path.read_text())
        run_uid, name, experiment = (str(found[key]) for key in ("run_uid", "name", "experiment"))
        return Identity(run_uid, name, experiment, int(found["begun_ms"]), str(found.get("parent_uid", "")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} is not a run directory: {path} is missing or damaged ({error}). Give the directory that has "
            "the folder `track` in it, for example runs/<name>"
        ) from error
