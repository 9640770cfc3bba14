"""Artifacts, data sets and models on their way to MLflow (called by `server.py` on the follower's thread)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.track.events import Artifact, Dataset, Event, Model
from orchestrator.track.redact import Redactor

_TEXT = frozenset({".yaml", ".yml", ".json", ".jsonl", ".txt", ".md", ".html", ".toml", ".log", ".csv", ".cfg", ".ini"})
_TEXT_LIMIT = 64 << 20


def ship(client: Any, run_id: str, event: Event, directory: Path, redactor: Redactor) -> None:
    """Send one artifact, data set or model. Sending it again replaces it by itself."""
    if isinstance(event, Artifact):
        _ship_artifact(client, run_id, event, directory, redactor)
    elif isinstance(event, Dataset):
        _ship_dataset(client, run_id, event)
    elif isinstance(event, Model):
        from orchestrator.track.model import register

        register(client, run_id, event, directory)


def _ship_artifact(client: Any, run_id: str, event: Artifact, directory: Path, redactor: Redactor) -> None:
    source = directory / event.path  # an absolute path stays itself
    folder = event.folder or None
    if not source.exists():
        if _is_held(client, run_id, source.name, event.folder):
            return  # shipped by a host whose disk we do not have
        raise FileNotFoundError(2, "artifact", str(source))
    if source.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            clean = Path(scratch) / source.name
            shutil.copytree(source, clean, copy_function=lambda a, b: _copy_clean(Path(a), Path(b), redactor))
            client.log_artifacts(run_id, str(clean), folder or source.name)
    elif source.suffix.lower() in _TEXT:
        with tempfile.TemporaryDirectory() as scratch:
            clean = Path(scratch) / source.name
            _copy_clean(source, clean, redactor)
            client.log_artifact(run_id, str(clean), folder)
    else:
        client.log_artifact(run_id, str(source), folder)


def _is_held(client: Any, run_id: str, name: str, folder: str) -> bool:
    """Whether the server has an artifact of this name already."""
    path = f"{folder}/{name}" if folder else name
    return any(item.path == path for item in client.list_artifacts(run_id, folder or None))


def _copy_clean(source: Path, target: Path, redactor: Redactor) -> None:
    """Copy a file; text loses its credentials on the way."""
    if source.suffix.lower() not in _TEXT or source.stat().st_size > _TEXT_LIMIT:
        shutil.copyfile(source, target)
        return
    target.write_text(redactor.text(source.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")


def _ship_dataset(client: Any, run_id: str, event: Dataset) -> None:
    """An `mlflow.data` object: the UI lists it under the run, `mlflow.data.get_source` opens its source."""
    from mlflow.entities import Dataset as DatasetEntity
    from mlflow.entities import DatasetInput, InputTag

    kind, source = _dataset_source(event.source)
    entity = DatasetEntity(
        name=event.name[:500],
        digest=event.digest[:36],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(dict(event.facts)),
    )
    tag = InputTag("mlflow.data.context", event.context)
    client.log_inputs(run_id, datasets=[DatasetInput(entity, tags=[tag])])


def _dataset_source(source: str) -> tuple[str, dict[str, Any]]:
    """MLflow's name for the kind of a data location, and its description."""
    scheme = source.split("://", 1)[0].lower() if "://" in source else "file"
    if scheme in {"http", "https"}:
        return "http", {"url": source}
    return {"s3": "s3", "gs": "gs", "file": "local"}.get(scheme, "local"), {"uri": source}
