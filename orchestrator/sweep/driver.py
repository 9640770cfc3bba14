"""What the driver of a sweep does besides running trials: progress, records, result files, the end table."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config.tree import SweepJobConfig
from orchestrator.data.folder import Folder
from orchestrator.evaluate.subject import OFF, flops_of
from orchestrator.launch.cli import EXIT_FAILED, EXIT_OK
from orchestrator.launch.lease import Lease
from orchestrator.launch.place import local_directory
from orchestrator.launch.record import RunRecord
from orchestrator.launch.show import duration, table
from orchestrator.sweep import page, plot, tables
from orchestrator.sweep.config import TRAIN
from orchestrator.sweep.importance import importances
from orchestrator.sweep.journal import End
from orchestrator.sweep.known import FINISHED, Trial
from orchestrator.sweep.measure import BASELINE
from orchestrator.sweep.records import SweepRecords
from orchestrator.sweep.results import Results, build
from orchestrator.sweep.state import SweepState
from orchestrator.sweep.tables import UNITS
from orchestrator.track.environment import driver_facts
from orchestrator.track.redact import Redactor

GOAL = 5
_PICTURE_EVERY = 8


class Driver:
    """What the driver does besides running trials: progress, records and result files."""

    def __init__(
        self, config: SweepJobConfig, folder: Folder, record: RunRecord, state: SweepState, facts: dict[str, str],
        lease: Lease,
    ) -> None:  # fmt: skip
        self._config, self._folder, self._record, self._state = config, folder, record, state
        self._lease = lease
        self._directory = local_directory(folder, record.run_uid)
        self._records = SweepRecords(config, record.run_uid, self._directory, record.attempts)
        self._begun = time.monotonic()
        self._facts = facts

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self._config.run.name

    @property
    def left(self) -> int:
        """Trials that are still to be run."""
        return self._state.left

    @property
    def trials(self) -> Mapping[int, Trial]:
        """All trials by number."""
        return self._state.trials

    def started(self, tags: Mapping[str, str]) -> None:
        """Records what is known before the first trial."""
        if self._config.sweep.mode == TRAIN:
            plain = {"gflops": flops_of(self._config.model, self._config.model.img_size, OFF) / 1e9}
            self._folder.put(BASELINE, json.dumps(plain).encode(), only_if_absent=True)
        lines = "\n".join(f"| **{name}** | {value} |" for name, value in self._facts.items())
        text = f"| | |\n|---|---|\n{lines}\n\nThe front: artifact `results/sweep.html`. Resume: the same command again."
        self._records.started({**driver_facts(), **tags}, text)
        self._records.known(self._state.trials, self._state.ends)

    def ended(self, trial: Trial, end: End) -> None:
        """Called after each trial.

        Raises:
            FencedError: the sweep belongs to another driver by now.
        """
        self._lease.check()
        self._records.trial(trial, end)
        count, results = len(self._state.ends), self.results()
        if end.state == FINISHED:
            what = ", ".join(f"{UNITS[n][0]} {UNITS[n][1] * end.values[n]:.4g}" for n in self._config.sweep.objectives)
        else:
            what = f"{end.state}: {end.error.splitlines()[0] if end.error else ''}"
        front = f"front {len(results.front)}, hypervolume {results.volume[-1]:.4f}" if results else "no front yet"
        print(f"trial {trial.number} ({count}/{self._state.budget}, {end.seconds:.0f} s): {what}; {front}", flush=True)
        if results:
            self._records.progress(results)
            self.write(results, picture=count % _PICTURE_EVERY == 0)

    def results(self) -> Results | None:
        """What is known so far; None before the unreduced model was measured."""
        try:
            plain = json.loads(self._folder.get(BASELINE))
        except FileNotFoundError:
            return None
        return build(self._config.sweep, self._state.trials, self._state.ends, plain)

    def write(self, results: Results, *, picture: bool) -> list[Path]:
        """Writes the result files; returns those of this call."""
        texts = {
            "front.csv": tables.points_csv(results.front, results.names),
            "trials.csv": tables.points_csv([*results.beside, *results.points], results.names),
            "front.md": f"# Front of {self._config.run.name}\n\n{tables.front_markdown(results)}\n",
            "sweep.html": page.page(results, f"Sweep {self._config.run.name}", list(self._facts.items())),
            "summary.json": json.dumps(tables.summary(results, dict(self._facts)), indent=1) + "\n",
            "failures.txt": tables.failures_text(self._state.ends) + "\n",
        }
        texts |= {
            f"recommended-{name}.yaml": tables.recommended_recipe(self._config, results, name)
            for name in results.recommended
        }
        return self._put({name: text.encode() for name, text in texts.items()} | self._picture(results, picture))

    def _picture(self, results: Results, wanted: bool) -> dict[str, bytes]:
        if not wanted:
            return {}
        points = {p.number: p for p in results.points}
        goals = self._config.sweep.goals()
        gained = {n: {g.name: g.sign * p.values[g.name] for g in goals} for n, p in points.items()}
        trials = [self._state.trials[number] for number in points]
        found = importances(trials, gained, self._config.sweep.objectives)
        with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
            title = f"{self._config.run.name}: {self._facts['image size']}"
            return {"sweep.png": plot.draw(results, found, title, Path(scratch, "sweep.png")).read_bytes()}

    def _put(self, files: dict[str, bytes]) -> list[Path]:
        paths = []
        for name, body in files.items():
            path = self._directory / "results" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            if self._folder.local_path() is None:
                self._folder.put(f"results/{name}", body)
            paths.append(path)
        return paths

    def finish(self) -> int:
        """Writes and records the end; prints the table."""
        results, left = self.results(), self._state.left
        complete = not left
        tags: dict[str, Any] = {"run.state": "finished" if complete else "stopped"}
        failed = complete and (results is None or not results.points)
        if results is not None:
            self._records.files(self.write(results, picture=True))
            tags |= {"sweep.front": len(results.front), "sweep.distinct": len(results.distinct)}
        if complete and not failed:
            replace(self._record, finished=True).save(self._folder)
        state = "failed" if failed else "finished" if complete else "killed"
        warning = self._records.close(state, "" if complete else f"{left} trials left", tags)
        if results is not None:
            print(self._table(results))
        if warning:
            print(f"warning: {warning}")
        if failed:
            print(f"error: no trial could be measured:\n{tables.failures_text(self._state.ends)}")
            return EXIT_FAILED
        if left:
            print(f"stopped with {left} trials left. Type the same command again to go on.")
        return EXIT_OK

    def _resting(self) -> str:
        count = self._state.resting
        return f", {count} trained in part (a larger sweep.budget goes on with them)" if count else ""

    def _table(self, results: Results) -> str:
        rows = [
            ("sweep", self._config.run.name),
            ("files", f"{self._folder.uri}/results (sweep.html, sweep.png, front.md, recommended-*.yaml)"),
            ("tracking", Redactor().shapes(self._config.track.uri)),
            *self._facts.items(),
            (
                "trials",
                f"{tables.trials_line(results)}{self._resting()}, {duration(time.monotonic() - self._begun)} now",
            ),
        ]
        for base in results.beside:
            figures = f"accuracy {100 * base.values['accuracy']:.2f} %, {base.values['images_per_second']:.0f} images/s"
            noise = f"{100 * results.noise:.1f} % (the unreduced model against itself, 95th percentile)"
            rows += [("unreduced", figures), ("noise floor", noise)]
        rows.append(("front", distinct_line(results)))
        for name, point in results.recommended.items():
            figures = ", ".join(f"{UNITS[n][0]} {tables.shown(point, n)}" for n in self._config.sweep.objectives)
            rows.append((name, f"trial {point.number}: {figures}; {point.label}"))
        return table(rows)


def distinct_line(results: Results) -> str:
    """How many front settings can be told apart, and why not more."""
    settings = [point for point in results.front if point.number >= 0]
    text = f"{len(settings)} settings, {len(results.distinct)} of them distinct by their intervals"
    if len(results.distinct) >= GOAL:
        return text
    if len(settings) < GOAL:
        return f"{text} (fewer than {GOAL}: the others are beaten in every objective)"
    return f"{text} (fewer than {GOAL}: the others' intervals overlap; more images or rounds would narrow them)"
