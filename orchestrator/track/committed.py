"""A run's journal in run storage: committed with checkpoints, brought back wherever the run goes on or ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from orchestrator.data.folder import Folder
from orchestrator.track.events import Artifact, Model
from orchestrator.track.identity import PLACE as IDENTITY
from orchestrator.track.journal import records, restore_segments

_PLACE = "journal"


class CommittedJournal:
    """The part of a journal that outlives this host's disk. Nothing to do where the run folder is a local disk.

    Args:
        folder: run folder on shared storage.
        directory: local directory of the run on this host.
    """

    def __init__(self, folder: Folder, directory: Path) -> None:
        self._folder = folder
        self._directory = directory
        self._remote = folder.local_path() is None
        self._held: set[str] = set()

    def commit(self, segments: Iterable[Path]) -> None:
        """Copies closed segments to run storage, each once; may wait for the network.

        Raises:
            StorageError: storage does not take them.
        """
        for path in segments:
            key = f"{_PLACE}/{path.parent.name}/{path.name}"
            if self._remote and key not in self._held:
                self._folder.put(key, path.read_bytes())
                self._held.add(key)

        identity = self._directory / IDENTITY
        if self._remote and identity.as_posix() not in self._held and identity.exists():
            self._folder.put(IDENTITY.as_posix(), identity, only_if_absent=True)
            self._held.add(identity.as_posix())

    def keep_files(self) -> None:
        """Copies the files that the journal speaks of: the server has not taken them and may never see this disk.

        Raises:
            StorageError: storage does not take them.
        """
        if not self._remote:
            return
        for name in self._named():
            path = self._directory / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                key = file.relative_to(self._directory).as_posix()
                if file.is_file() and not self._folder.exists(key):
                    self._folder.put(key, file)

    def restore_files(self) -> None:
        """Puts back the files that the journal speaks of and this host lacks, as far as storage has them.

        Raises:
            StorageError: storage cannot be read.
        """
        for name in self._named():
            if not (self._directory / name).exists():
                self._fetch(name)

    def _named(self) -> list[str]:
        """Files and folders of the run directory that records name."""
        names = set()
        for record in records(self._directory):
            if isinstance(record.event, Artifact):
                names.add(record.event.path)
            elif isinstance(record.event, Model):
                names.add(record.event.weights)
        return sorted(name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts)

    def _fetch(self, key: str) -> None:
        path = self._directory / key
        if self._folder.exists(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folder.download(key, path)
            return
        for name in self._folder.names(key):
            self._fetch(f"{key}/{name}")

    def restore(self) -> None:
        """Puts back the segments that this host lacks, and who the run is.

        Raises:
            StorageError: storage cannot be read.
        """
        if not self._remote:
            return
        identity = self._directory / IDENTITY
        if not identity.exists() and self._folder.exists(IDENTITY.as_posix()):
            identity.parent.mkdir(parents=True, exist_ok=True)
            self._folder.download(IDENTITY.as_posix(), identity)
        with tempfile.TemporaryDirectory(prefix="journal-") as scratch:
            pairs = []
            for stream in self._folder.names(_PLACE):
                for name in self._folder.names(f"{_PLACE}/{stream}"):
                    path = Path(scratch, stream, name)
                    path.parent.mkdir(exist_ok=True)
                    self._folder.download(f"{_PLACE}/{stream}/{name}", path)
                    pairs.append((stream, path))
            restore_segments(self._directory, pairs)
