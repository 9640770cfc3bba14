"""The facade through which a run tells what happens.

Every method writes one line to the local journal and returns; MLflow follows on another thread. No method touches the
network, waits for a disk, or raises because of the server or the disk; `trouble` tells of a disk that took less than
all. A `ValueError` means a mistake in the calling code (a metric that is not a number, a name MLflow cannot hold) and
shows at the first call, whatever the server does.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.track import events
from orchestrator.track.backlog import Backlog
from orchestrator.track.config import TrackConfig
from orchestrator.track.follower import Follower, Shipper
from orchestrator.track.identity import write_identity
from orchestrator.track.journal import Journal, segments, streams
from orchestrator.track.redact import Redactor, flatten
from orchestrator.track.server import RunIdentity, Server

_log = logging.getLogger(__name__)
_METRIC_NAME = re.compile(r"[\w\-. :]+(/[\w\-. :]+)*")


class Recorder:
    """Records one process' part of one run.

    Use one recorder per process; several processes of a run (rank 0, the driver before and after it, one per node for
    system metrics) share the run directory or have one each, and end in one MLflow run found by `run_uid`.

    Args:
        config: settings with a resolved `uri` (see `orchestrator.track.config.resolve`).
        run_uid: identity of the run, the same after every restart.
        directory: the run directory on a local disk.
        attempt: number of this start of the run, from 1.
        name: readable run name for the UI.
        role: who writes ("rank0", "driver", "node1").
        creates: False for processes that may not create the MLflow run (system metrics of other nodes).
        run_id: an MLflow run that exists already and is not found by `run_uid`.
        parent_uid: `run_uid` of the run under which this one is shown (a trial of a sweep).
        secrets: values that may appear nowhere (see `redact.secret_values`).
        follow: False to write the journal only.
        storage: how `jobs/sync_runs.py` is told the run folder where that is not this disk (`Folder.remote`): what is
            not shipped is replayed from there.
    """

    def __init__(
        self,
        config: TrackConfig,
        run_uid: str,
        directory: Path,
        attempt: int = 1,
        *,
        name: str = "",
        role: str = "rank0",
        creates: bool = True,
        run_id: str = "",
        parent_uid: str = "",
        secrets: Sequence[str] = (),
        follow: bool = True,
        storage: Sequence[str] = (),
    ) -> None:
        self.directory = Path(directory).absolute()
        self._config = config
        self._storage = storage
        self._redactor = Redactor(secrets)
        self._journal = Journal(self.directory, attempt, role, int(config.segment_mb * (1 << 20)))
        begun_ms = write_identity(self.directory, run_uid, name, config.experiment, parent_uid)
        self._known_names: set[str] = set()
        self._last_step = -1
        self._lag_step = -1
        self._server = Server(
            config, RunIdentity(run_uid, name, begun_ms, creates, run_id, parent_uid), self.directory, self._redactor
        )
        self._shipper = Shipper(self.directory, self._server, config, own=self._journal.stream)
        self._follower: Follower | None = None
        if follow:
            self._follower = Follower(self._shipper, config, self._record_lag)
            self._follower.start()

    # -- what a run tells -------------------------------------------------------------------------------------------

    def params(self, tree: Mapping[str, Any]) -> None:
        """Record settings: nested mappings become dotted names, credentials are hidden."""
        flat = flatten(tree)
        self._journal.append(events.Params({name: self._redactor.value(name, flat[name]) for name in flat}))

    def tags(self, values: Mapping[str, object]) -> None:
        """Record facts that may be corrected later; the last value counts."""
        self._journal.append(events.Tags({name: self._redactor.value(name, values[name]) for name in values}))

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows on top of the run."""
        self._journal.append(events.Tags({"mlflow.note.content": self._redactor.text(markdown)}))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers measured at a step; NaN and infinities are kept as what they are.

        Args:
            step: optimiser step, 0 or more.
            values: plain numbers. A tensor on a device is refused: reading it would synchronise the step.

        Raises:
            ValueError: a value is not a number, or a name has characters other than letters, digits, `_-. :/`.
        """
        self._check(values)
        if values:
            self._journal.append(events.Metrics(int(step), {name: float(values[name]) for name in values}))
            self._last_step = max(self._last_step, int(step))

    def _check(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if not isinstance(value, (int, float, np.integer, np.floating)):
                raise ValueError(
                    f"metric {name!r} is a {type(value).__name__}; allowed: int or float (use tensor.item() at a "
                    "moment when the device is synchronised anyway)"
                )
            if name not in self._known_names:
                if not _METRIC_NAME.fullmatch(name) or len(name) > 250:
                    raise ValueError(f"metric name {name!r}: allowed are up to 250 letters, digits, and _-. :/")
                self._known_names.add(name)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file or directory with the run; it is read when it is shipped, so leave it in place unchanged.

        Args:
            path: below the run directory (recorded relative to it), or absolute.
            folder: place in the run's artifacts, for example "figures".
        """
        full = Path(path).absolute()
        inside = full.is_relative_to(self.directory)
        self._journal.append(events.Artifact(str(full.relative_to(self.directory) if inside else full), folder))

    def text(self, name: str, content: str, folder: str = "") -> Path:
        """Write a small text file without credentials and keep it as an artifact (not for the step thread)."""
        path = self.directory / "track" / "files" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._redactor.text(content), encoding="utf-8")
        self.artifact(path, folder)
        return path

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, object]) -> None:
        """Record data that the run uses.

        Args:
            name: for example "fashion-mnist/train".
            digest: the manifest's hash (MLflow shows 36 characters).
            source: path or URI of the shards.
            context: "training" or "validation".
            facts: counts worth seeing (samples, shards, classes, bytes).
        """
        plain = {key: str(value) for key, value in facts.items()}
        self._journal.append(events.Dataset(name, digest, self._redactor.shapes(source), context, plain))

    def model(
        self,
        weights: Path,
        config: Mapping[str, Any],
        *,
        step: int,
        mean: Sequence[float],
        std: Sequence[float],
        aliases: Sequence[str] = ("candidate",),
        metrics: Mapping[str, float] | None = None,
        card: str = "",
    ) -> None:
        """Pack weights as a loadable model, upload it and register it as a version (all of it on the follower).

        Args:
            weights: safetensors file of backbone weights.
            config: the `ModelConfig` as a plain dictionary.
            step: optimiser step of the weights.
            mean: what the student's input was normalised with, per channel.
            std: as `mean`.
            aliases: names that shall point at this version.
            metrics: figures shown with the version.
            card: model card in Markdown.
        """
        name = self._config.registered_model or self._config.experiment
        full = Path(weights).absolute()
        inside = full.is_relative_to(self.directory)
        event = events.Model(
            weights=str(full.relative_to(self.directory) if inside else full),
            config=dict(config),
            name=name,
            mean=tuple(mean),
            std=tuple(std),
            aliases=tuple(aliases),
            step=step,
            metrics=dict(metrics or {}),
            card=self._redactor.text(card),
        )
        self._journal.append(event)

    def state(self, name: str, reason: str = "") -> None:
        """Record that the run is "running", "finished", "failed" or "killed", with a reason a person can use."""
        if name not in events.STATES:
            raise ValueError(f"state {name!r}; allowed: {', '.join(events.STATES)}")
        self._journal.append(events.State(name, self._redactor.text(reason)))

    def report(self) -> Path:
        """Write the run's story as one HTML file, and its losses as a picture; keep both (reads all journals)."""
        from orchestrator.track.figures import curve_figure
        from orchestrator.track.history import load_history
        from orchestrator.track.report import write_report

        history, files = load_history(self.directory), self.directory / "track" / "files"
        losses = {name: sorted(history.series[name].items()) for name in sorted(history.series) if "/loss" in name}
        if losses:
            curve_figure(files / "figures" / "loss.png", losses, title=f"{history.name} · loss", unit="loss")
            self.artifact(files / "figures" / "loss.png", "figures")
        path = files / "report.html"
        write_report(history, self.directory, path)
        self.artifact(path)
        return path

    def journals(self) -> None:
        """Keep the journals of the run's other processes as artifacts: what every curve and report was made from."""
        for stream in streams(self.directory):
            if stream != self._journal.stream:
                for segment in segments(stream):
                    self.artifact(segment, f"journal/{stream.name}")

    # -- its own health ---------------------------------------------------------------------------------------------

    def _record_lag(self, seconds: float, failures: int) -> None:
        """Called on the follower's thread; at most one value per step, or the server would see a step twice."""
        step = self._last_step
        if step > self._lag_step:
            self._lag_step = step
            values = {"tracking/lag_seconds": round(seconds, 3), "tracking/failed_tries": float(failures)}
            self._journal.append(events.Metrics(step, values))

    @property
    def run_id(self) -> str:
        """The MLflow run's id, "" until the server answered."""
        return self._server.run_id

    @property
    def lost(self) -> int:
        """Records that the local disk did not take."""
        return self._journal.lost

    def trouble(self) -> str:
        """Why the run may not go on as if it were recorded; "" while the local disk takes every record."""
        return self._journal.trouble()

    def close_segment(self) -> list[Path]:
        """End the journal segment; returns every closed segment of this process, to be committed with a checkpoint.

        Segments never change once closed: copy those that run storage lacks, as `<stream>/<file>` (the last two parts
        of each path), and give them to `journal.restore_segments` on another host.
        """
        return self._journal.close_segment()

    def close(self, timeout: float | None = None) -> Backlog:
        """Stop recording and wait for the follower, at most `timeout` seconds (default: `close_timeout_s`)."""
        wait = self._config.close_timeout_s if timeout is None else timeout
        begun = time.monotonic()
        self._journal.close()
        error = self._journal.last_error
        if self._follower is not None:
            self._follower.finish(wait)
            error = self._follower.last_error or error
        backlog = self._backlog(error)
        if self._follower is None or not self._follower.is_alive():
            self._journal.lock.release()
        _log.info("tracking closed after %.1f s: %s", time.monotonic() - begun, backlog)
        return backlog

    def _backlog(self, error: str) -> Backlog:
        target = self._redactor.shapes(self._config.uri)
        replay = shlex.join(["python", "jobs/sync_runs.py", *(self._storage or [str(self.directory)]), "--uri", target])
        return Backlog(
            waiting=self._shipper.waiting(),
            refused=self._shipper.refused,
            lost=self._journal.lost,
            reason=error,
            target=target,
            replay=replay,
            run_id=self._server.run_id,
        )
