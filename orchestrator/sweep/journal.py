"""The state of a sweep: an append-only journal of trials in the sweep's folder, on a disk or in an object store.

    <sweep>/trials/000012/asked.json           the setting, written before the trial runs
    <sweep>/trials/000012/rung-00000468.json   what a trial in training measured at a step
    <sweep>/trials/000012/error-1.json         why an attempt failed (one file per failed attempt)
    <sweep>/trials/000012/end.json             how the trial ended, with everything it measured

Every object is written once, whole, and never changed: `end.json` is created only where none is, so of two processes
that believe to run the same trial the first one counts and the second learns so. What has no `end.json` has not
finished and runs again after a restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from itpn_core.errors import UserError
from orchestrator.data.folder import Folder
from orchestrator.sweep.known import FINISHED, RUNNING, Trial
from orchestrator.sweep.space import Space

TRIALS = "trials"
_READERS = 16


@dataclass(frozen=True)
class End:
    """How a trial ended.

    Attributes:
        state: "finished" | "pruned" | "failed" | "infeasible".
        values: objectives and whatever limits name, by name; empty unless it was measured.
        details: everything else worth keeping, JSON values.
        error: of a trial that was not measured.
        seconds: of the attempt that counts.
        ended: seconds since the epoch.
    """

    state: str
    values: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    ended: float = 0.0


class TrialJournal:
    """Reads and writes the trials of one sweep.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def asked(self, trial: Trial) -> None:
        """Notes a trial before it runs.

        Raises:
            UserError: the number is taken by another setting: two drivers run the same sweep.
        """
        body = {"number": trial.number, "values": dict(trial.setting), "memo": dict(trial.memo)}
        if not self.folder.put(_key(trial.number, "asked"), _dump(body), only_if_absent=True):
            raise UserError(
                f"trial {trial.number} of {self.folder.uri} is already there: another process runs the same sweep."
                " Wait for it, or give this one another run.name"
            )

    def failed(self, number: int, error: str) -> int:
        """Notes a failed attempt; returns how many have failed by now."""
        count = self.failures(number) + 1
        self.folder.put(_key(number, f"error-{count}"), _dump({"error": error}), only_if_absent=True)
        return count

    def failures(self, number: int) -> int:
        """Failed attempts of a trial so far."""
        return sum(name.startswith("error-") for name in self.folder.names(_place(number)))

    def rung(self, number: int, step: int, values: Mapping[str, float]) -> int:
        """Notes what a trial in training measured at a step; returns how many steps it was measured at before."""
        self.folder.put(_key(number, f"rung-{step:08d}"), _dump(values), only_if_absent=True)
        return [name for name, _ in self._rungs(number)].index(step)

    def curve(self, number: int) -> list[dict[str, float]]:
        """What a trial in training measured, rung by rung."""
        return [json.loads(self.folder.get(key)) for _, key in self._rungs(number)]

    def _rungs(self, number: int) -> list[tuple[int, str]]:
        names = sorted(name for name in self.folder.names(_place(number)) if name.startswith("rung-"))
        return [(int(name[5:13]), f"{_place(number)}/{name}") for name in names]

    def finished_curves(self) -> list[list[dict[str, float]]]:
        """Curves of every trial that was trained to its end."""
        numbers = (int(name) for name in self.folder.names(TRIALS) if name.isdigit())
        ends = ((number, self.end(number)) for number in numbers)
        return [self.curve(number) for number, end in ends if end is not None and end.state == FINISHED]

    def ended(self, number: int, end: End) -> End:
        """Notes how a trial ended; returns the end that counts, which is an earlier one if there is one."""
        if self.folder.put(_key(number, "end"), _dump(asdict(end)), only_if_absent=True):
            return end
        found = self.end(number)
        return found if found is not None else end

    def end(self, number: int) -> End | None:
        """How a trial ended; None while it has not."""
        try:
            return End(**json.loads(self.folder.get(_key(number, "end"))))
        except FileNotFoundError:
            return None

    def trial(self, number: int, space: Space) -> Trial:
        """A trial as it was asked for, running.

        Raises:
            FileNotFoundError: there is none of that number.
        """
        body = json.loads(self.folder.get(_key(number, "asked")))
        return Trial(number, space.setting(body["values"]), RUNNING, {}, body["memo"])

    def load(self, space: Space) -> tuple[list[Trial], dict[int, End]]:
        """Every trial in order of number, and the ends of those that have one.

        Raises:
            ConfigError: a trial that the space does not know (the recipe's space was changed).
        """
        numbers = sorted(int(name) for name in self.folder.names(TRIALS) if name.isdigit())
        with ThreadPoolExecutor(_READERS, thread_name_prefix="journal") as pool:
            read = list(pool.map(self._read, numbers))
        trials, ends = [], {}
        for number, body, end in read:
            if body is None:
                continue  # a folder without its first object: killed before anything was written
            state = end.state if end else RUNNING
            values = end.values if end else {}
            trials.append(Trial(number, space.setting(body["values"]), state, values, body["memo"]))
            if end:
                ends[number] = end
        return trials, ends

    def _read(self, number: int) -> tuple[int, dict[str, Any] | None, End | None]:
        try:
            body: dict[str, Any] = json.loads(self.folder.get(_key(number, "asked")))
        except FileNotFoundError:
            return number, None, None
        return number, body, self.end(number)


def finished(ends: Mapping[int, End]) -> dict[int, End]:
    """The ends that count for the front, by trial number."""
    return {number: end for number, end in sorted(ends.items()) if end.state == FINISHED}


def trial_uid(sweep_uid: str, number: int) -> str:
    """Identity of a trial's run, the same after every restart."""
    return hashlib.sha256(f"{sweep_uid}/{number}".encode()).hexdigest()[:32]


def by_time(ends: Mapping[int, End]) -> Iterable[tuple[int, End]]:
    """(number, end) in the order in which trials ended."""
    return sorted(ends.items(), key=lambda item: (item[1].ended, item[0]))


def _place(number: int) -> str:
    return f"{TRIALS}/{number:06d}"


def _key(number: int, name: str) -> str:
    return f"{_place(number)}/{name}.json"


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, allow_nan=False).encode()
