"""Checkpoints in a folder: committed as a whole or not at all, checked before they are used.

Layout under `<run>/checkpoints/`:

    step-00000120/00000002-0001-tensors.safetensors   every tensor of the training state
    step-00000120/00000002-0001-state.json            step, counters, fingerprints
    step-00000120/COMMITTED.json   names, sizes and SHA-256 of the two; written last, its presence is the commit

In front of a name stand the writer's fencing number (`runlog.py`) and a number of the save: a writer that slept while
another took the run cannot touch the other's files when it wakes, and the run log refuses its commit.

A checkpoint without its marker, or whose bytes differ from the marker, is passed over with a logged line and the one
before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from itpn_core.errors import UserError
from orchestrator.checkpoint.retention import kept
from orchestrator.checkpoint.runlog import FencedError, Writer
from orchestrator.data.folder import Folder, StorageError

log = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"
STATE = "state.json"
MARKER = "COMMITTED.json"


class CheckpointError(UserError):
    """A checkpoint does not fit what it is loaded into; the message names the first difference."""


@dataclass(frozen=True)
class Snapshot:
    """A training state on the host, detached from the training that goes on."""

    step: int
    tensors: dict[str, Tensor]
    """CPU tensors by name; nothing else may reference them."""
    state: dict[str, Any]
    """JSON values."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what made it; known for a loaded one."""


@dataclass(frozen=True)
class Saved:
    """What one committed save took, all of it beside the training."""

    bytes: int
    seconds: float
    cpu_seconds: float


def _nothing() -> None:
    """Nothing has to happen before the commit."""


class CheckpointStore:
    """Saves in the background, lists, verifies and loads checkpoints of one run.

    Args:
        folder: the run's folder.
        keep: newest committed checkpoints that stay.
        every_steps: of every range of so many steps one checkpoint stays for good; 0 = none does.
        made_by: fingerprints (settings, data, code) that go into every marker.
        term: of the driver that owns the run (`runlog.Writer`).
    """

    def __init__(
        self, folder: Folder, keep: int, every_steps: int = 0, made_by: dict[str, str] | None = None, term: int = 0
    ) -> None:
        self._folder = folder
        self.writer = Writer(folder, term)
        self._saves = 0
        self._keep = keep
        self._every_steps = every_steps
        self.made_by = made_by or {}
        self.best = -1
        """Step of the best checkpoint, which stays; -1 = none is."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.last_committed = -1
        """Step of the newest checkpoint this process committed; -1 before the first."""
        self.last_requested = -1
        """Step of the newest snapshot that was handed over."""
        self.failure: StorageError | None = None
        """Why the newest finished save failed; None when it was committed."""
        self.failures = 0
        """Saves of this process that failed."""
        self.passed_over: list[str] = []
        """What `load_newest` found damaged, a line each."""
        self.last_save: Saved | None = None
        """Size and cost of the newest committed save."""

    @property
    def busy(self) -> bool:
        """Whether a snapshot is still being written."""
        return self._pending is not None and not self._pending.done()

    def save(self, snapshot: Snapshot, before_commit: Callable[[], None] = _nothing) -> None:
        """Starts to write a snapshot and returns; waits only when the previous one is still being written.

        Args:
            snapshot: what to write.
            before_commit: called on the writing thread; the checkpoint is committed only when it succeeds.
        """
        self.wait()
        self.last_requested = snapshot.step
        self._pending = self._pool.submit(self._try_write, snapshot, before_commit)

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until nothing is being written, at most `timeout` seconds; says whether that is so."""
        if self._pending is not None:
            done, _ = wait([self._pending], timeout)
            if not done:
                return False
            pending, self._pending = self._pending, None
            pending.result()
        return True

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self.writer.close()

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first (their bytes are not yet verified)."""
        names = [n for n in self._folder.names("checkpoints") if n.startswith("step-")]
        return [int(n.removeprefix("step-")) for n in names if self._folder.exists(f"checkpoints/{n}/{MARKER}")]

    def load_newest(self) -> Snapshot | None:
        """The newest checkpoint whose bytes are whole, or None when there is none."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                line = f"the checkpoint of step {step} is damaged and is passed over: {error}"
                log.warning(line)
                self.passed_over.append(line)
        return None

    def load(self, step: int) -> Snapshot:
        """Loads one checkpoint after comparing its bytes with its marker.

        Raises:
            CheckpointError: a file is missing, short or changed.
        """
        where = f"checkpoints/{_name(step)}"
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            try:
                marker = json.loads(self._folder.get(f"{where}/{MARKER}"))
                for name, expected in marker["files"].items():
                    # Checkpoints from before there were fencing numbers have no stamp.
                    self._folder.download(f"{where}/{marker.get('stamp', '')}{name}", Path(scratch, name))
                    _verify(Path(scratch, name), expected)
                tensors = load_file(Path(scratch, TENSORS))
                state = json.loads(Path(scratch, STATE).read_text(encoding="utf-8"))
            except (FileNotFoundError, SafetensorError, json.JSONDecodeError, KeyError) as error:
                raise CheckpointError(f"{self._folder.uri}/{where}: {type(error).__name__}: {error}") from None
        return Snapshot(step, tensors, state, marker.get("made_by", {}))

    def _try_write(self, snapshot: Snapshot, before_commit: Callable[[], None]) -> None:
        """Writes, and keeps a storage failure for whoever asks: training does not end because of it."""
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            size = self._write(snapshot, before_commit)
        except FencedError as error:
            log.warning("the checkpoint of step %d was not committed: %s", snapshot.step, error)
            self._discard(snapshot.step)
            return
        except (StorageError, OSError, SafetensorError) as error:
            # safetensors wraps a full disk in an error of its own.
            self.failure = error if isinstance(error, StorageError) else StorageError(f"cannot write: {error}")
            self.failures += 1
            log.warning("the checkpoint of step %d was not saved: %s", snapshot.step, self.failure)
            self._discard(snapshot.step)
            return
        self.failure = None
        self.last_committed = snapshot.step
        self.last_save = Saved(size, time.perf_counter() - began, time.thread_time() - cpu)
        self._retire()

    def _write(self, snapshot: Snapshot, before_commit: Callable[[], None]) -> int:
        where = f"checkpoints/{_name(snapshot.step)}"
        if not self.writer.number:
            self.writer.begin()
        self._saves += 1
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            tensors, state = Path(scratch, TENSORS), Path(scratch, STATE)
            save_file(snapshot.tensors, tensors)
            state.write_text(json.dumps(snapshot.state, sort_keys=True), encoding="utf-8")
            files = {path.name: _describe(path) for path in (tensors, state)}
            for path in (tensors, state):
                self._folder.put(f"{where}/{self._stamp}{path.name}", path)
        before_commit()
        marker = {
            "version": 2, "step": snapshot.step, "fence": self.writer.number, "stamp": self._stamp, "files": files,
            "made_by": self.made_by,
        }  # fmt: skip
        self.writer.commit(snapshot.step)
        self._folder.put(f"{where}/{MARKER}", json.dumps(marker).encode())
        return sum(file["bytes"] for file in files.values())

    @property
    def _stamp(self) -> str:
        """What the names of this save's objects begin with; no other save's do."""
        return f"{self.writer.number:08d}-{self._saves:04d}-"

    def _discard(self, step: int) -> None:
        """Removes what a failed save left, so that it does not fill the disk; best effort, as storage is in trouble."""
        where = f"checkpoints/{_name(step)}"
        with contextlib.suppress(StorageError):
            self._folder.delete(f"{where}/{self._stamp}{name}" for name in (TENSORS, STATE))
            if not self._folder.names(where):
                self._folder.delete_tree(where)

    def _retire(self) -> None:
        if self.writer.look() is not None:
            return  # what is old is for the successor to say
        try:
            self._clear_leftovers()
            steps = self.steps()
            for step in sorted(set(steps) - kept(steps, self._keep, self._every_steps, self.best)):
                # The marker goes first: a half-deleted checkpoint must not look committed.
                where = f"checkpoints/{_name(step)}"
                self._folder.delete([f"{where}/{MARKER}"])
                self._folder.delete_tree(where)
        except StorageError as error:
            log.warning("old checkpoints were not removed: %s", error)

    def _clear_leftovers(self) -> None:
        """Removes what earlier saves of this step left, whose marker this one has replaced."""
        where = f"checkpoints/{_name(self.last_committed)}"
        mine = {f"{self._stamp}{name}" for name in (TENSORS, STATE)} | {MARKER}
        self._folder.delete(f"{where}/{name}" for name in self._folder.names(where) if name not in mine)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: dict[str, Any]) -> None:
    found = _describe(path)
    if found != expected:
        raise CheckpointError(
            f"{path.name} has {found['bytes']} bytes and SHA-256 {found['sha256'][:12]}…, "
            f"its marker says {expected['bytes']} bytes and {expected['sha256'][:12]}…"
        )


__all__ = ["CheckpointError", "CheckpointStore", "Snapshot", "StorageError"]
