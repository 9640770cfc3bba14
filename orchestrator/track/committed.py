"""A run's journal in run storage: committed with checkpoints, brought back wherever the run goes on or ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from orchestrator.data.folder import Folder
from orchestrator.track.journal import restore_segments

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

    def restore(self) -> None:
        """Puts back the segments that this host lacks.

        Raises:
            StorageError: storage cannot be read.
        """
        if not self._remote:
            return
        with tempfile.TemporaryDirectory(prefix="journal-") as scratch:
            pairs = []
            for stream in self._folder.names(_PLACE):
                for name in self._folder.names(f"{_PLACE}/{stream}"):
                    path = Path(scratch, stream, name)
                    path.parent.mkdir(exist_ok=True)
                    self._folder.download(f"{_PLACE}/{stream}/{name}", path)
                    pairs.append((stream, path))
            restore_segments(self._directory, pairs)
