"""One evaluation apart from the training: a committed checkpoint is opened and measured as between two steps.

The checkpoint is a whole training state and is loaded as a resume loads it (`TrainState.restore`, from wherever run
storage is), and the kind of training measures it with the code that measures inside: the same numbers come out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.config.tree import JobConfig
from orchestrator.data.manifest import Manifest
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.config import sqlite_path
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.train.build import build_state
from orchestrator.train.context import RunContext
from orchestrator.train.kind import export_weights, open_kind
from orchestrator.train.results import DONE, Request, Result
from orchestrator.train.state import TrainState, check_measured, is_better

_CLOSE_S = 5.0


@dataclass(frozen=True)
class Measured:
    """What `measure` brings back."""

    result: Result
    colours: Any = None
    """Colours of the feature pictures, for the next one."""


def measure(config: JobConfig, run: RunContext, request: Request, colours: Any = None) -> Measured:
    """Measures one checkpoint; keeps its pictures, and its weights where it is the best so far.

    Args:
        config: the run's resolved configuration.
        run: surroundings of this process: one rank by itself.
        request: which checkpoint.
        colours: of the pictures before this one.

    Raises:
        CheckpointError: the checkpoint is not whole.
        ConfigError: `checkpoint.best_metric` is not measured.
    """
    began = time.perf_counter()
    # One process has room for a whole model or none at all, and a few forward passes do not pay for compiling.
    plain = replace(config, train=replace(config.train, compile=False, grad_checkpointing=False, parallel="replicate"))
    kind = open_kind(plain, run, Manifest.load(plain.data.source, plain.data.store))
    kind.colours = colours
    state = _load(plain, kind, run, request.step)
    answers: dict[str, list[int]] = {}
    with state.averaged() as task:
        metrics = kind.evaluate(task, request.step, answers)
        name, mode = plain.checkpoint.best_metric, plain.checkpoint.best_mode
        check_measured(metrics, name)
        _keep_figures(plain, run, kind.figures(task, request.step))
        if name and is_better(metrics[name], request.best, mode):
            export_weights(kind, plain, run, task, request.step, "best", metrics)
    result = Result(request.step, DONE, metrics, answers, seconds=time.perf_counter() - began)
    return Measured(result, kind.colours)


def _load(config: JobConfig, kind: Any, run: RunContext, step: int) -> TrainState:
    state = build_state(config, kind, run.device)
    store = CheckpointStore(run.folder, keep=1)
    try:
        state.restore(store.load(step))
    finally:
        store.close()
    return state


def _keep_figures(config: JobConfig, run: RunContext, paths: Sequence[Path]) -> None:
    """Puts pictures and tables into the run's journal, in a stream of this process' own."""
    if not paths:
        return
    recorder = Recorder(
        config.track,
        run.run_uid,
        run.directory,
        run.attempt,
        name=config.run.name,
        role="beside",
        creates=False,
        secrets=secret_values(os.environ),
        follow=config.track.follow and sqlite_path(config.track.uri) is None,  # rank 0 ships to such a file
    )
    for path in paths:
        recorder.artifact(path, path.parent.name)
    segments = recorder.close_segment()
    recorder.close(_CLOSE_S)
    CommittedJournal(run.folder, run.directory).commit(segments)
