"""Checkpoints in a folder: committed as a whole or not at all, checked before they are used.

Layout under `<run>/checkpoints/`:

    step-00000120/00000002-0001-tensors.safetensors   every tensor of the training state
    step-00000120/00000002-0001-state.json            step, counters, fingerprints
    step-00000120/COMMITTED.json   names, sizes and SHA-256 of the others; written last, its presence is the commit

In front of a name stand the writer's fencing number (`runlog.py`) and a number of the save: a writer that slept while
another took the run cannot touch the other's files when it wakes, and the run log refuses its commit.

Where ranks hold parts of the model, each writes its own `...-tensors-00001-of-00004.safetensors` instead
(`orchestrator.checkpoint.pieces`), and rank 0 commits once all have told it the sizes and checksums of theirs. Either
kind can be read whole, or in any other parts.

A checkpoint whose bytes differ from its marker, or a newer one without a marker, is passed over with a line to the user
and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from safetensors import SafetensorError
from torch import Tensor

from itpn_core.errors import UserError
from orchestrator.checkpoint.pieces import Assembly, Piece, ShapeError, write_pieces
from orchestrator.checkpoint.retention import kept
from orchestrator.checkpoint.runlog import FencedError, Writer
from orchestrator.data.folder import Folder, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

TENSORS = "tensors.safetensors"
STATE = "state.json"
MARKER = "COMMITTED.json"


class CheckpointError(UserError):
    """A checkpoint does not fit what it is loaded into; the message names the first difference."""


class MisfitError(CheckpointError):
    """A whole checkpoint, but of another model: an older one would be no better."""


class Together(Protocol):
    """Ranks that write one checkpoint together; called on the writing threads, in the same order on all."""

    rank: int
    index: int
    """Which of the parts this rank holds."""
    parts: int
    """How many parts there are."""
    writes: bool
    """Whether it writes its part; of equal copies, one does."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Raises RuntimeError when a rank is gone."""


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
    pieces: dict[str, Piece] = field(default_factory=dict)
    """Tensors of which this rank holds a part only."""


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
        together: the other ranks, where each writes a part; None when one rank writes all.
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        every_steps: int = 0,
        made_by: dict[str, str] | None = None,
        term: int = 0,
        together: Together | None = None,
    ) -> None:
        self._folder = folder
        self.writer = Writer(folder, term)
        self._saves = 0
        self._stamp = ""
        """What the names of the newest save's objects begin with; no other save's do. Known where the save is led."""
        self._together = together
        self._keep = keep
        self._every_steps = every_steps
        self.made_by = made_by or {}
        self.best = -1
        """Step of the best checkpoint, which stays; -1 = none is."""
        self.pinned: frozenset[int] = frozenset()
        """Steps whose checkpoints somebody still needs: they stay, too."""
        self.committed: list[int] = []
        """Steps of all checkpoints that this process committed, in order."""
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

    def close(self, timeout: float | None = None) -> None:
        """Waits for the last save, at most `timeout` seconds, and ends the background thread."""
        ended = False
        try:
            ended = self.wait(timeout)
        finally:
            self._pool.shutdown(wait=ended, cancel_futures=True)
            self.writer.close()

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first (their bytes are not yet verified)."""
        return [step for step in self._begun() if self._folder.exists(f"checkpoints/{_name(step)}/{MARKER}")]

    def _begun(self) -> list[int]:
        """Steps of which anything was saved, committed or not, oldest first."""
        names = [n for n in self._folder.names("checkpoints") if n.startswith("step-")]
        return [int(n.removeprefix("step-")) for n in names]

    def load_newest(self, wanted: Mapping[str, Piece] | None = None) -> Snapshot | None:
        """The newest checkpoint whose bytes are whole, or None when there is none; `wanted` as for `load`.

        Raises:
            MisfitError: it belongs to another model.
        """
        steps = self.steps()
        for step in self._begun():
            if step > max(steps, default=-1):
                self._pass_over(f"the checkpoint of step {step} was never committed (its save was cut short)")
        for step in reversed(steps):
            try:
                return self.load(step, wanted)
            except MisfitError:
                raise
            except CheckpointError as error:
                self._pass_over(f"the checkpoint of step {step} is damaged and is passed over: {error}")
        return None

    def _pass_over(self, line: str) -> None:
        log.warning(line)
        self.passed_over.append(line)

    def load(self, step: int, wanted: Mapping[str, Piece] | None = None) -> Snapshot:
        """Loads one checkpoint after comparing its bytes with its marker.

        Args:
            step: which one.
            wanted: tensors of which only some rows are wanted; all others come whole.

        Raises:
            CheckpointError: a file is missing, short or changed.
            MisfitError: it belongs to another model.
        """
        where, found = f"checkpoints/{_name(step)}", Assembly(wanted or {})
        state: dict[str, Any] | None = None
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            try:
                marker = _marker(self._folder.get(f"{where}/{MARKER}"))
                for name, expected in marker["files"].items():
                    path = Path(scratch, name)
                    # Checkpoints from before there were fencing numbers have no stamp.
                    self._folder.download(f"{where}/{marker.get('stamp', '')}{name}", path)
                    _verify(path, expected)
                    if name == STATE:
                        state = json.loads(path.read_text(encoding="utf-8"))
                    else:
                        found.add(path)
                    path.unlink()  # one file at a time: a rank needs room for one part, not for all
            except ShapeError as error:
                raise MisfitError(f"the checkpoint of step {step} does not fit this model: {error}") from None
            except (FileNotFoundError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
                raise CheckpointError(f"{self._folder.uri}/{where}: {type(error).__name__}: {error}") from None
        if state is None or found.incomplete():
            raise CheckpointError(f"{self._folder.uri}/{where}: {', '.join(found.incomplete()) or STATE} is incomplete")
        return Snapshot(step, found.tensors, state, marker.get("made_by", {}))

    def state_of(self, step: int) -> dict[str, Any]:
        """What one checkpoint holds besides tensors; raises as `load`."""
        where = f"checkpoints/{_name(step)}"
        try:
            marker = _marker(self._folder.get(f"{where}/{MARKER}"))
            found: dict[str, Any] = json.loads(self._folder.get(f"{where}/{marker.get('stamp', '')}{STATE}"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
            raise CheckpointError(f"{self._folder.uri}/{where}: {type(error).__name__}: {error}") from None
        return found

    def _try_write(self, snapshot: Snapshot, before_commit: Callable[[], None]) -> None:
        """Writes, and keeps a storage failure for whoever asks: training does not end because of it."""
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            size = self._write(snapshot, before_commit)
        except FencedError as error:
            log.warning("the checkpoint of step %d was not committed: %s", snapshot.step, error)
            self._discard(snapshot.step)
            return
        except StorageError as error:
            self.failure = error
            self.failures += 1
            log.warning("the checkpoint of step %d was not saved: %s", snapshot.step, self.failure)
            self._discard(snapshot.step)
            return
        self.failure = None
        self.last_committed = snapshot.step
        self.committed.append(snapshot.step)
        self.last_save = Saved(size, time.perf_counter() - began, time.thread_time() - cpu)
        if self._leads:
            self._retire()

    @property
    def _leads(self) -> bool:
        return self._together is None or self._together.rank == 0

    def _write(self, snapshot: Snapshot, before_commit: Callable[[], None]) -> int:
        """Every rank's part, then rank 0's marker; all ranks come to the same end."""
        where = f"checkpoints/{_name(snapshot.step)}"
        stamp = self._agree(lambda: self._begin() if self._leads else "")[0]
        parts = self._agree(lambda: self._write_part(f"{where}/{stamp}", snapshot))
        files = {name: described for part in parts for name, described in part.items()}
        self._agree(lambda: self._commit(where, snapshot.step, files, before_commit) if self._leads else None)
        return sum(file["bytes"] for file in files.values())

    def _agree(self, call: Callable[[], T]) -> list[T]:
        """What the call gave on every rank.

        Raises:
            FencedError: the right to commit is gone; the same on all ranks.
            StorageError: it failed somewhere; the same on all ranks.
        """
        try:
            mine: tuple[Any, str, bool] = call(), "", False
        except FencedError as error:
            mine = None, str(error), True
        except (StorageError, OSError, SafetensorError) as error:
            # safetensors wraps a full disk in an error of its own.
            mine = None, str(error) if isinstance(error, StorageError) else f"cannot write: {error}", False
        try:
            found = self._together.gather(mine) if self._together else [mine]
        except RuntimeError as error:
            raise StorageError(f"a rank is gone while a checkpoint was being written: {error}") from error
        failures = [(text, fenced) for _, text, fenced in found if text]
        for text, fenced in sorted(failures, key=lambda failure: not failure[1]):
            raise FencedError(text) if fenced else StorageError(text)
        return [value for value, _, _ in found]

    def _begin(self) -> str:
        """Names a new save, which replaces nobody's files."""
        if not self.writer.number:
            self.writer.begin()
        self._saves += 1
        self._stamp = f"{self.writer.number:08d}-{self._saves:04d}-"
        return self._stamp

    def _write_part(self, prefix: str, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
        together = self._together
        name = f"tensors-{together.index + 1:05d}-of-{together.parts:05d}.safetensors" if together else TENSORS
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            paths = []
            if snapshot.tensors:
                paths.append(Path(scratch, name))
                write_pieces(paths[-1], snapshot.tensors, snapshot.pieces)
            if self._leads:
                paths.append(Path(scratch, STATE))
                paths[-1].write_text(json.dumps(snapshot.state, sort_keys=True), encoding="utf-8")
            files = {path.name: _describe(path) for path in paths}
            for path in paths:
                self._folder.put(f"{prefix}{path.name}", path)
        return files

    def _commit(
        self, where: str, step: int, files: dict[str, dict[str, Any]], before_commit: Callable[[], None]
    ) -> None:
        before_commit()
        marker = {
            "version": 2, "step": step, "fence": self.writer.number, "stamp": self._stamp, "files": files,
            "made_by": self.made_by,
        }  # fmt: skip
        self.writer.commit(step)
        self._folder.put(f"{where}/{MARKER}", json.dumps(marker).encode())

    def _discard(self, step: int) -> None:
        """Removes what a failed save left, so that it does not fill the disk; best effort, as storage is in trouble."""
        if not self._stamp:
            return  # led elsewhere, or failed before it had a name
        where = f"checkpoints/{_name(step)}"
        with contextlib.suppress(StorageError, FileNotFoundError, ValueError, KeyError):
            # Its answer got lost, and without its files it would stand for a checkpoint.
            if _marker(self._folder.get(f"{where}/{MARKER}")).get("stamp") == self._stamp:
                self._folder.delete([f"{where}/{MARKER}"])
        with contextlib.suppress(StorageError):
            names = self._folder.names(where)
            self._folder.delete(f"{where}/{name}" for name in names if name.startswith(self._stamp))
            if not self._folder.names(where):
                self._folder.delete_tree(where)

    def _retire(self) -> None:
        if self.writer.look() is not None:
            return  # what is old is for the successor to say
        try:
            self._clear_leftovers()
            steps = self.steps()
            for step in sorted(set(steps) - kept(steps, self._keep, self._every_steps, self.best) - self.pinned):
                # The marker goes first: a half-deleted checkpoint must not look committed.
                where = f"checkpoints/{_name(step)}"
                self._folder.delete([f"{where}/{MARKER}"])
                self._folder.delete_tree(where)
        except StorageError as error:
            log.warning("old checkpoints were not removed: %s", error)

    def _clear_leftovers(self) -> None:
        """Removes what earlier saves of this step left, whose marker this one has replaced."""
        where = f"checkpoints/{_name(self.last_committed)}"
        names = [name for name in self._folder.names(where) if name != MARKER and not name.startswith(self._stamp)]
        self._folder.delete(f"{where}/{name}" for name in names)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _marker(text: bytes) -> dict[str, Any]:
    """What a marker says; KeyError where something else than a marker is there."""
    marker = json.loads(text)
    files = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(files, dict):
        raise KeyError("no list of files in the marker")
    for name, file in files.items():
        if Path(name).name != name or not isinstance(file, dict) or {"bytes", "sha256"} - file.keys():
            raise KeyError(f"{name!r} in the marker is no file with bytes and sha256")
    return cast(dict[str, Any], marker)


def _verify(path: Path, expected: dict[str, Any]) -> None:
    found = _describe(path)
    if found != expected:
        raise CheckpointError(
            f"{path.name} has {found['bytes']} bytes and SHA-256 {found['sha256'][:12]}…, "
            f"its marker says {expected['bytes']} bytes and {expected['sha256'][:12]}…"
        )


__all__ = ["CheckpointError", "CheckpointStore", "MisfitError", "Snapshot", "StorageError", "Together"]
