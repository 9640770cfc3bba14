"""Checkpoints in a folder: committed as a whole or not at all, checked before they are used.

Layout under `<run>/checkpoints/`:

    step-00000120/tensors.safetensors   every tensor of the training state
    step-00000120/state.json            step, counters, fingerprints
    step-00000120/COMMITTED.json        sizes and SHA-256 of the two; written last, its presence is the commit

A checkpoint without its marker, or whose bytes differ from the marker, is passed over with a logged line and the one
before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from itpn_core.errors import UserError
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


class CheckpointStore:
    """Saves in the background, lists, verifies and loads checkpoints of one run.

    Args:
        folder: the run's folder.
        keep: newest committed checkpoints that stay.
    """

    def __init__(self, folder: Folder, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.last_committed = -1
        """Step of the newest checkpoint this process committed; -1 before the first."""
        self.last_requested = -1
        """Step of the newest snapshot that was handed over."""

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a snapshot; waits only when the previous one is still being written.

        Raises:
            StorageError: the previous save failed.
        """
        self.wait()
        self.last_requested = snapshot.step
        self._pending = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Blocks until nothing is being written; raises what the writing raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

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
                log.warning("checkpoint at step %d is damaged and is passed over: %s", step, error)
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
                    self._folder.download(f"{where}/{name}", Path(scratch, name))
                    _verify(Path(scratch, name), expected)
                tensors = load_file(Path(scratch, TENSORS))
                state = json.loads(Path(scratch, STATE).read_text(encoding="utf-8"))
            except (FileNotFoundError, SafetensorError, json.JSONDecodeError, KeyError) as error:
                raise CheckpointError(f"{self._folder.uri}/{where}: {type(error).__name__}: {error}") from None
        return Snapshot(step, tensors, state)

    def _write(self, snapshot: Snapshot) -> None:
        where = f"checkpoints/{_name(snapshot.step)}"
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            tensors, state = Path(scratch, TENSORS), Path(scratch, STATE)
            save_file(snapshot.tensors, tensors)
            state.write_text(json.dumps(snapshot.state, sort_keys=True), encoding="utf-8")
            files = {path.name: _describe(path) for path in (tensors, state)}
            # A marker of an earlier attempt at this step would vouch for bytes that are being replaced.
            self._folder.delete([f"{where}/{MARKER}"])
            for path in (tensors, state):
                self._folder.put(f"{where}/{path.name}", path)
        marker = json.dumps({"version": 1, "step": snapshot.step, "files": files})
        self._folder.put(f"{where}/{MARKER}", marker.encode())
        self.last_committed = snapshot.step
        self._retire()

    def _retire(self) -> None:
        for step in self.steps()[: -self._keep]:
            # The marker goes first: a half-deleted checkpoint must not look committed.
            where = f"checkpoints/{_name(step)}"
            self._folder.delete([f"{where}/{MARKER}"])
            self._folder.delete_tree(where)


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
