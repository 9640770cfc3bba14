"""A run as its journals tell it: the source of reports and comparisons, without any server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.track.events import Artifact, Dataset, Event, Metrics, Model, Params, State, Tags
from orchestrator.track.identity import read_identity
from orchestrator.track.journal import records


@dataclass
class Attempt:
    """One start of the run."""

    number: int
    begun_ms: int
    ended_ms: int
    state: str = "no end recorded"
    reason: str = ""


@dataclass
class RunHistory:
    """What happened in a run. Of steps done twice the last value counts, for it belongs to the weights at the end.

    Attributes:
        name: readable name.
        run_uid: identity.
        params: flattened settings.
        tags: facts.
        series: value by step, by metric name.
        datasets: data used.
        artifacts: files kept with the run.
        models: weights registered.
        attempts: the starts of the run, in order.
        redone: how many (metric, step) were recorded more than once.
    """

    name: str
    run_uid: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    redone: int = 0

    def take(self, event: Event) -> None:
        """Add one event."""
        if isinstance(event, Metrics):
            for name, value in event.values.items():
                points = self.series.setdefault(name, {})
                self.redone += event.step in points
                points[event.step] = value
        elif isinstance(event, Params):
            self.params.update(event.values)
        elif isinstance(event, Tags):
            self.tags.update(event.values)
        elif isinstance(event, Dataset):
            if event not in self.datasets:
                self.datasets.append(event)
        elif isinstance(event, Artifact):
            if event not in self.artifacts:
                self.artifacts.append(event)
        elif isinstance(event, Model):
            self.models.append(event)

    def last(self, name: str) -> float | None:
        """The value of a metric at its highest step."""
        points = self.series.get(name)
        return points[max(points)] if points else None


def load_history(directory: Path) -> RunHistory:
    """Read every journal of a run directory.

    Raises:
        ValueError: the directory holds no recorded run.
    """
    identity = read_identity(directory)
    history = RunHistory(identity.name or directory.name, identity.run_uid)
    attempts: dict[int, Attempt] = {}
    for record in records(directory):
        attempt = attempts.setdefault(record.attempt, Attempt(record.attempt, record.ms, record.ms))
        attempt.begun_ms, attempt.ended_ms = min(attempt.begun_ms, record.ms), max(attempt.ended_ms, record.ms)
        if isinstance(record.event, State) and record.event.name != "running":
            attempt.state, attempt.reason = record.event.name, record.event.reason
        history.take(record.event)
    history.attempts = [attempts[number] for number in sorted(attempts)]
    return history
