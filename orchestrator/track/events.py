"""Typed records of a run: what the journal holds and what followers ship.

One record is one line of strict JSON (non-finite numbers are strings), so that any tool can read a journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

STATES: Final = ("running", "finished", "failed", "killed")


@dataclass(frozen=True)
class Params:
    """Settings that do not change: the flattened config, already redacted."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Tags:
    """Facts about the run that may be corrected later (the last value counts)."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Metrics:
    """Numbers measured at one step."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Artifact:
    """A file or folder of the run directory to be kept with the run.

    `path` is relative to the run directory where it lies inside it, so that the record outlives the host.
    """

    path: str
    folder: str = ""


@dataclass(frozen=True)
class Dataset:
    """Data that the run used, shown by MLflow beside the run."""

    name: str
    digest: str
    source: str
    context: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Weights to be packed, uploaded and registered; see `orchestrator.track.model`."""

    weights: str
    config: Mapping[str, Any]
    name: str
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    aliases: tuple[str, ...] = ()
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    card: str = ""


@dataclass(frozen=True)
class State:
    """The run began, ended or died."""

    name: str
    reason: str = ""


Event = Params | Tags | Metrics | Artifact | Dataset | Model | State
_KINDS: Final[dict[str, type[Any]]] = {
    "params": Params,
    "tags": Tags,
    "metrics": Metrics,
    "artifact": Artifact,
    "dataset": Dataset,
    "model": Model,
    "state": State,
}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Record:
    """One event with its place in the journal: sequence number, time (ms since the epoch) and attempt."""

    seq: int
    ms: int
    attempt: int
    event: Event


def _pack_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def encode(record: Record) -> bytes:
    """One journal line, ending in a newline."""
    body: dict[str, Any] = {"seq": record.seq, "ms": record.ms, "attempt": record.attempt}
    event = record.event
    body["kind"] = _NAMES[type(event)]
    body.update(vars(event))
    if isinstance(event, Metrics):
        body["values"] = {name: _pack_number(value) for name, value in event.values.items()}
    elif isinstance(event, Model):
        body["metrics"] = {name: _pack_number(value) for name, value in event.metrics.items()}
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Record | None:
    """The record of one journal line; None when the line is torn or not a record of this version."""
    try:
        body = json.loads(line)
        kind = _KINDS[body.pop("kind")]
        seq, ms, attempt = body.pop("seq"), body.pop("ms"), body.pop("attempt")
        if kind is Metrics:
            body["values"] = {name: float(value) for name, value in body["values"].items()}
        elif kind is Model:
            body["metrics"] = {name: float(value) for name, value in body["metrics"].items()}
            body.update({name: tuple(body[name]) for name in ("aliases", "mean", "std")})
        return Record(int(seq), int(ms), int(attempt), kind(**body))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
