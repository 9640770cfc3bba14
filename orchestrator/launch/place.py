"""Where one host keeps a run's local files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from orchestrator.data.folder import Folder


def local_directory(folder: Folder, run_uid: str) -> Path:
    """Where this host keeps a run's journal: the run folder when that is a local disk, else a scratch folder."""
    return folder.local_path() or Path(tempfile.gettempdir()) / f"itpn-run-{run_uid}"
