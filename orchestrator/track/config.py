"""Settings of run tracking."""

from __future__ import annotations

import socket
import urllib.parse
from dataclasses import dataclass, field, replace
from pathlib import Path

from itpn_core.errors import ConfigError

_KNOCK_S = 3.0


@dataclass(frozen=True)
class TrackConfig:
    """Where records go and what the follower may take of the machine. None of it can slow a training step."""

    uri: str = field(
        default="",
        metadata={"help": "MLflow tracking URI; empty: $MLFLOW_TRACKING_URI, else a sqlite file beside the runs"},
    )
    experiment: str = field(default="itpn", metadata={"help": "MLflow experiment that groups comparable runs"})
    artifact_root: str = field(
        default="",
        metadata={"help": "artifact location of a new experiment; empty: beside the database"},
    )
    required: bool = field(
        default=False, metadata={"help": "refuse to start when the server does not answer (never stops a running job)"}
    )
    follow: bool = field(
        default=True, metadata={"help": "ship records to MLflow while the run goes on; off: journal only (sync later)"}
    )
    queue_bound: int = field(
        default=1000, metadata={"help": "most metric points held in memory for shipping; the rest waits in the journal"}
    )
    timeout_s: int = field(default=5, metadata={"help": "seconds that one call to the server may take"})
    upload_timeout_s: int = field(default=300, metadata={"help": "seconds that one artifact upload may stall"})
    poll_s: float = field(default=1.0, metadata={"help": "seconds between looks at the journal when it was empty"})
    backoff_max_s: float = field(default=30.0, metadata={"help": "longest pause between tries while the server fails"})
    segment_mb: float = field(default=8.0, metadata={"help": "journal file size at which the next file is begun"})
    lag_every_s: float = field(default=30.0, metadata={"help": "seconds between records of tracking/lag_seconds"})
    system_every_s: float = field(default=15.0, metadata={"help": "seconds between system metrics; 0 turns them off"})
    close_timeout_s: float = field(default=60.0, metadata={"help": "seconds that the end of a job waits for shipping"})
    registered_model: str = field(
        default="", metadata={"help": "name under which final weights are registered; empty: not registered"}
    )
    description: str = field(default="", metadata={"help": "a sentence about the purpose of this run, shown in the UI"})

    def __post_init__(self) -> None:
        """Refuse values with which the follower could not work."""
        for name, least in (("queue_bound", 1), ("timeout_s", 1), ("upload_timeout_s", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"track.{name}", getattr(self, name), f"allowed is {least} or more")
        for name in ("poll_s", "backoff_max_s", "segment_mb", "close_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"track.{name}", getattr(self, name), "allowed is more than 0")
        if not self.experiment.strip():
            raise ConfigError("track.experiment", self.experiment, "a name is needed", "For example itpn.")


def resolve(config: TrackConfig, runs: Path, environment_uri: str = "") -> TrackConfig:
    """The same settings with a tracking URI that means the same in every process and working directory.

    Args:
        config: settings as the user gave them.
        runs: directory that holds all runs; an unset URI becomes `sqlite:///<runs>/mlflow.db` with an absolute path.
        environment_uri: value of MLFLOW_TRACKING_URI in the driver ("" when unset); the config's own URI wins.

    Raises:
        ConfigError: a sqlite URI with a relative path (each worker has its own working directory).
    """
    uri = config.uri or environment_uri or f"sqlite:///{runs.resolve()}/mlflow.db"
    path = sqlite_path(uri)
    if path is not None and not path.is_absolute():
        raise ConfigError(
            "track.uri", uri, "a sqlite path must be absolute, each worker has its own directory",
            f"Write sqlite:///{path.resolve()}",
        )  # fmt: skip
    return replace(config, uri=uri)


def why_away(config: TrackConfig) -> str:
    """Why nobody can be reached where the MLflow server should be; "" when somebody listens, or there is no server."""
    parts = urllib.parse.urlsplit(config.uri)
    if parts.scheme not in ("http", "https") or not config.follow:
        return ""
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_KNOCK_S).close()
    except (OSError, ValueError) as error:
        return f"{parts.scheme}://{parts.hostname}: {error}"
    return ""


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, None for any other back end."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
