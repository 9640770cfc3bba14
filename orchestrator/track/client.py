"""The way in to MLflow: bounded calls, a database that is set up safely, and errors a follower can act upon."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.track.config import TrackConfig, sqlite_path


class RefusedError(ValueError):
    """The server will never take this record, however often it is sent."""


class RunLostError(RuntimeError):
    """The run is not on the server any more (database replaced, run deleted): it has to be made again."""


class UnreachableError(RuntimeError):
    """The server does not answer, or not yet; the same call may succeed later."""


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Exclusive lock between processes of one host; raises UnreachableError instead of waiting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise UnreachableError(f"another process holds {path}") from error
    try:
        yield
    finally:
        os.close(fd)


def limit_mlflow(config: TrackConfig) -> None:
    """Bound what one MLflow call may take, before MLflow is imported.

    With MLflow's own settings one call to a dead server blocked 246 s. It reads these limits from the environment only.
    Retrying is the follower's business, so MLflow's own retries are off.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(config.timeout_s)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"] = str(config.upload_timeout_s)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Deprecations between MLflow and its own dependencies say nothing to the user of this project.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(mlflow|sqlalchemy|alembic)(\..*)?$")
    warnings.filterwarnings("ignore", category=UserWarning, message=r"(?s).*MLflow doesn't validate")


def open_client(config: TrackConfig) -> Any:
    """An `MlflowClient` for the configured URI; a new sqlite file is set up under a lock (its set-up is a race)."""
    limit_mlflow(config)
    from mlflow import MlflowClient  # seconds to import: here, on the follower's thread

    with translated():
        path = sqlite_path(config.uri)
        if path is None:
            return MlflowClient(config.uri, registry_uri=config.uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_suffix(path.suffix + ".lock")):
            if not path.exists():
                _create_sqlite(path)
            client = MlflowClient(config.uri, registry_uri=config.uri)
            client.search_experiments(max_results=1)
        return client


def _create_sqlite(path: Path) -> None:
    """Set up a new sqlite file under another name, then rename it.

    MLflow runs some seventy migrations on first use, and sqlite commits their tables one by one: a process killed in
    between leaves a file that MLflow can neither use nor repair.
    """
    from mlflow import MlflowClient

    new = path.with_name(f"{path.name}.new-{uuid.uuid4().hex[:8]}")
    for left in path.parent.glob(f"{path.name}.new-*"):  # of set-ups that were killed; we hold the lock
        left.unlink()
    try:
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # `mlflow ui` takes no lock of ours and may have come first
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what MLflow raises into the three answers a follower can act upon."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()
        message = str(error)
        if status == 404 or "must be in the 'active' state" in message:
            raise RunLostError(message) from error
        if status == 400:
            raise RefusedError(message) from error
        raise UnreachableError(message) from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, RefusedError):
            raise
        if isinstance(error, OSError | json.JSONDecodeError):  # a broken answer, not a broken record
            raise UnreachableError(f"{type(error).__name__}: {error}") from error
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    except FileNotFoundError as error:
        raise RefusedError(f"file is not there: {error.filename}") from error
    except (UnreachableError, RunLostError):
        raise
    except Exception as error:  # back ends raise their own families (SQL, object stores): all may pass later
        raise UnreachableError(f"{type(error).__name__}: {error}") from error
