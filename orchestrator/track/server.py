"""One run on one MLflow server: every call about a run is in this file (attachments are packed in those beside it).

Only `MlflowClient` is used: the fluent API keeps global state and ends runs it did not begin. All calls happen on a
follower's thread, never on the caller of a Recorder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from itpn_core.errors import ConfigError
from orchestrator.track.client import (
    RefusedError,
    RunLostError,
    UnreachableError,
    file_lock,
    open_client,
    translated,
)
from orchestrator.track.config import TrackConfig, sqlite_path
from orchestrator.track.events import Metrics, Params, Record, State, Tags
from orchestrator.track.redact import Redactor
from orchestrator.track.steps import StepSet

RUN_UID: Final = "run_uid"
PARENT: Final = "mlflow.parentRunId"
_METRICS, _PARAMS, _TAGS = 1000, 100, 50  # the server's limits per request (tags fewer: they may be 8 kB each)
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000
_BAD_NAME = re.compile(r"[^/\w.\- :]")
_STATUS: Final = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run one run, whatever happens to processes and servers.

    Attributes:
        run_uid: our own identifier, made once and stored beside the checkpoints.
        name: readable name shown in the UI.
        begun_ms: when the run began (ms since the epoch), which may be long before the server first answers.
        creates: whether this process may create the MLflow run. One process of a run may; the others wait for it.
        run_id: id of an MLflow run that a person named; "" finds the run by `run_uid`.
        parent_uid: `run_uid` of the run under which this one is shown; "" for none.
    """

    run_uid: str
    name: str = ""
    begun_ms: int | None = None
    creates: bool = True
    run_id: str = ""
    parent_uid: str = ""


def check_answers(config: TrackConfig) -> None:
    """Ask the server once, before a job starts, for users who set `track.required`.

    Raises:
        ConfigError: it did not answer within `track.timeout_s`.
    """
    try:
        with translated():
            open_client(config).search_experiments(max_results=1)
    except (UnreachableError, RefusedError, RunLostError) as error:
        redactor = Redactor()
        reason = redactor.shapes(" ".join(str(error).split()))[:200]
        raise ConfigError(
            "track.uri",
            redactor.shapes(config.uri),
            f"MLflow does not answer there ({reason})",
            "Start it (docs/tracking.md), correct the URI, or set track.required=false and ship later with "
            "jobs/sync_runs.py",
        ) from error


def _is_empty(run: Any) -> bool:
    return not run.data.metrics and not run.data.params


class Server:
    """One run on one MLflow server.

    Args:
        config: settings with a resolved URI.
        identity: which run.
        directory: the run directory, for artifact paths and the lock around creation.
        redactor: hides credentials in text artifacts and in error messages.
    """

    def __init__(self, config: TrackConfig, identity: RunIdentity, directory: Path, redactor: Redactor) -> None:
        self._config = config
        self.identity = identity
        self._directory = directory
        self._redactor = redactor
        self._client: Any = None
        self._existed = False
        self._seen: dict[str, StepSet] = {}
        self._params: dict[str, str] = {}
        self.run_id = ""

    def connect(self) -> str:
        """Find the run by its tag, or create it. Returns the MLflow run id."""
        if self.run_id:
            return self.run_id
        if self._client is None:
            self._client = open_client(self._config)
        with translated(), file_lock(self._directory / "track" / "connect.lock"):
            found = self._find()
            self._existed = bool(found)
            if not found and not self.identity.creates:
                raise UnreachableError("the run is not on the server yet, and this process does not create it")
            run_id = str(found[0].info.run_id) if found else self._create()
            self._params = dict(found[0].data.params) if found else {}
            if found and PARENT not in found[0].data.tags:
                # A trial's own workers may have made its run, not knowing of the sweep's.
                for name, value in self._parent_tag().items():
                    self._client.set_tag(run_id, name, value)
        self._seen.clear()
        self.run_id = run_id
        return run_id

    def forget(self) -> None:
        """The run was lost on the server: the next `connect` finds or creates it anew."""
        self.run_id = ""
        self._seen.clear()

    def _find(self) -> list[Any]:
        """Runs with our tag in any experiment: those that hold something first, then the oldest.

        Every process that asks gets the same order, and so chooses the same run.
        """
        if self.identity.run_id:
            return [self._client.get_run(self.identity.run_id)]
        return self._tagged(self.identity.run_uid)

    def _tagged(self, run_uid: str) -> list[Any]:
        experiments = [found.experiment_id for found in self._client.search_experiments(max_results=1000)]
        runs = self._client.search_runs(experiments, filter_string=f"tags.{RUN_UID} = '{run_uid}'", max_results=10)
        return sorted(runs, key=lambda run: (_is_empty(run), run.info.start_time, run.info.run_id))

    def _create(self) -> str:
        tags = {RUN_UID: self.identity.run_uid, **self._parent_tag()}
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        experiment_id = experiment.experiment_id if experiment else self._create_experiment()
        run = self._client.create_run(
            experiment_id,
            start_time=self.identity.begun_ms,
            run_name=self.identity.name or self.identity.run_uid,
            tags=tags,
        )
        return str(run.info.run_id)

    def _parent_tag(self) -> dict[str, str]:
        """The tag by which MLflow shows a run below another; empty for a run without a parent."""
        if not self.identity.parent_uid:
            return {}
        parents = self._tagged(self.identity.parent_uid)
        if not parents:
            raise UnreachableError("the parent run is not on the server yet")
        return {PARENT: str(parents[0].info.run_id)}

    def _create_experiment(self) -> str:
        """A relative default artifact location would land in whatever directory this process runs in."""
        path = sqlite_path(self._config.uri)
        root = self._config.artifact_root or (f"{path.parent}/artifacts" if path else "")
        location = f"{root.rstrip('/')}/{_BAD_NAME.sub('_', self._config.experiment)}" if root else None
        # The kind makes the UI open with charts and runs instead of its language-model views.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(self._config.experiment, artifact_location=location, tags=tags))

    def remove_ghosts(self) -> int:
        """Delete empty runs that carry our tag: a create call that timed out may have succeeded unseen."""
        with translated():
            ghosts = [run.info.run_id for run in self._find() if run.info.run_id != self.run_id and _is_empty(run)]
            for run_id in ghosts:
                self._client.delete_run(run_id)
        return len(ghosts)

    def ship(self, batch: Sequence[Record]) -> None:
        """Send records; when it returns the server holds them. Sending a record again changes nothing.

        Raises:
            RefusedError, RunLostError, UnreachableError: see there.
        """
        with translated():
            metrics = [(record.ms, record.event) for record in batch if isinstance(record.event, Metrics)]
            if metrics:
                self._ship_metrics(metrics)
            for record in batch:
                if not isinstance(record.event, Metrics):
                    self._ship_other(record)

    def _steps(self, name: str) -> StepSet:
        """Steps of one metric that the server holds; asked once per metric, and only of a run that existed."""
        if name not in self._seen:
            steps = StepSet()
            if self._existed:
                held = sorted({point.step for point in self._client.get_metric_history(self.run_id, name)})
                for step in held:
                    steps.add(step)
            self._seen[name] = steps
        return self._seen[name]

    def _ship_metrics(self, batch: Sequence[tuple[int, Metrics]]) -> None:
        from mlflow.entities import Metric

        fresh: dict[tuple[str, int], Any] = {}
        for ms, event in batch:
            for name, value in event.values.items():
                key = (name, event.step)
                if key not in fresh and event.step not in self._steps(name):
                    fresh[key] = Metric(name, value, ms, event.step)
        points = list(fresh.items())
        for start in range(0, len(points), _METRICS):
            part = points[start : start + _METRICS]
            try:
                self._client.log_batch(self.run_id, metrics=[point for _, point in part])
            except BaseException:
                # The server may have taken it before the connection broke: ask again what it holds.
                self._existed = True
                for name in {name for (name, _), _ in part}:
                    self._seen.pop(name, None)
                raise
            for (name, step), _ in part:
                self._seen[name].add(step)

    def _ship_other(self, record: Record) -> None:
        event = record.event
        if isinstance(event, Params):
            self._ship_params(event.values, record.attempt)
        elif isinstance(event, Tags):
            self._ship_tags(event.values)
        elif isinstance(event, State):
            self._ship_state(event, record.ms)
        else:
            from orchestrator.track import attachments

            attachments.ship(self._client, self.run_id, event, self._directory, self._redactor)

    def _ship_params(self, values: Mapping[str, str], attempt: int) -> None:
        """MLflow never changes a param: a resumed run with another value gets a tag that says so."""
        from mlflow.entities import Param

        wanted = {_BAD_NAME.sub("_", name)[:250]: value[:_PARAM_LENGTH] for name, value in values.items()}
        changed = {
            f"config.changed.{name}"[:250]: f"{self._params[name]} -> {value} (attempt {attempt})"
            for name, value in wanted.items()
            if self._params.get(name, value) != value
        }
        new = [(name, value) for name, value in wanted.items() if name not in self._params]
        for start in range(0, len(new), _PARAMS):
            part = new[start : start + _PARAMS]
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in part])
            self._params.update(part)
        if changed:
            self._ship_tags(changed)

    def _ship_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_BAD_NAME.sub("_", name)[:250], value[:_TAG_LENGTH]) for name, value in values.items()]
        for start in range(0, len(tags), _TAGS):
            self._client.log_batch(self.run_id, tags=tags[start : start + _TAGS])

    def _ship_state(self, event: State, ms: int) -> None:
        status = _STATUS[event.name]
        if event.reason:
            self._ship_tags({"state.reason": event.reason})
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status, end_time=ms)

    def explain(self, error: BaseException) -> str:
        """One line about an error, without credentials."""
        return self._redactor.shapes(" ".join(str(error).split()))[:300]
