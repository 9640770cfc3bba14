"""A sweep in MLflow: one parent run, and one run below it for each trial."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.config.load import to_yaml
from orchestrator.config.tree import SweepJobConfig
from orchestrator.sweep.journal import End, trial_uid
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, PRUNED, Trial
from orchestrator.sweep.results import Results
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.track.sync import sync

_STATE = {FINISHED: "finished", PRUNED: "killed", FAILED: "failed", INFEASIBLE: "failed"}
_SHIPPED = "shipped"
_PATIENCE_S = 20.0


class SweepRecords:
    """Writes the parent's journal, and those of the trials as they end; MLflow follows.

    Args:
        config: resolved configuration.
        run_uid: of the sweep.
        directory: local directory of the sweep.
        attempt: number of this start.
    """

    def __init__(self, config: SweepJobConfig, run_uid: str, directory: Path, attempt: int) -> None:
        self._config, self._uid, self._directory = config, run_uid, directory
        self._secrets = secret_values(os.environ)
        self._parent = Recorder(
            config.track, run_uid, directory, attempt, name=config.run.name, role="sweep", secrets=self._secrets,
            follow=config.track.follow,
        )  # fmt: skip
        # One thread: shipping may take as long as it likes, but may not take the processors from what is measured.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trial-records")

    def started(self, facts: Mapping[str, object], description: str) -> None:
        """Records what is known before the first trial."""
        self._parent.state("running")
        self._parent.params(asdict(self._config))
        self._parent.tags({**facts, "run.kind": "sweep"})
        self._parent.describe(description)
        self._parent.text("config.yaml", to_yaml(self._config))

    def known(self, trials: Mapping[int, Trial], ends: Mapping[int, End]) -> None:
        """Makes up for trials that ended while nobody could record them."""
        for number, end in ends.items():
            if not (self._place(number) / _SHIPPED).exists():
                self.trial(trials[number], end)

    def trial(self, trial: Trial, end: End) -> None:
        """Records a trial's end as a run below the sweep's."""
        directory = self._place(trial.number)
        recorder = Recorder(
            self._config.track, trial_uid(self._uid, trial.number), directory, name=f"trial-{trial.number:04d}",
            role="sweep", parent_uid=self._uid, secrets=self._secrets, follow=False,
        )  # fmt: skip
        # Under names of their own: a trial that was trained has its whole configuration there already.
        recorder.params({f"setting.{name}": value for name, value in trial.setting.fields.items()})
        recorder.params({f"space.{name}": value for name, value in trial.setting.items()})
        recorder.tags({"trial.state": end.state, "trial.number": trial.number, "run.kind": "trial"})
        recorder.metrics(0, {**end.values, "seconds": end.seconds})
        recorder.state(_STATE[end.state], end.error)
        recorder.close(0.0)
        if self._config.track.follow:
            self._pool.submit(self._ship, directory)

    def _ship(self, directory: Path) -> None:
        if sync(directory, self._config.track, _PATIENCE_S).complete:
            (directory / _SHIPPED).touch()

    def _place(self, number: int) -> Path:
        return self._directory / "trial-records" / f"{number:06d}"

    def progress(self, results: Results) -> None:
        """Records how the sweep stands, one step per ended trial."""
        step = len(results.ends)
        best = results.recommended.values()
        values = {
            "sweep/hypervolume": results.volume[-1] if results.volume else 0.0,
            "sweep/front": float(len(results.front)),
            "sweep/distinct": float(len(results.distinct)),
            **{f"sweep/{state}": float(results.count(state)) for state in (FINISHED, PRUNED, FAILED, INFEASIBLE)},
        }
        if best:
            values["sweep/best_accuracy"] = max(point.values["accuracy"] for point in best)
        self._parent.metrics(step, values)

    def files(self, paths: Sequence[Path]) -> None:
        """Keeps result files with the parent run."""
        for path in paths:
            self._parent.artifact(path, "results")

    def close(self, state: str, reason: str, tags: Mapping[str, Any]) -> str:
        """Ends the records; returns a line for people when something is not in MLflow."""
        self._parent.tags(tags)
        self._parent.state(state, reason)
        wait = self._config.track.close_timeout_s
        backlog = self._parent.close(wait)
        # A server that is down is not waited for once per trial: what is not begun stays in the journals.
        self._pool.shutdown(wait=True, cancel_futures=self._config.track.follow and not backlog.empty)
        behind = backlog.lost or (self._config.track.follow and not backlog.empty)
        return str(backlog) if behind else ""
