"""What a training shows to Prometheus, through the metrics port that every Ray node has.

Rank 0 sets the numbers once per log window. Setting one changes a table of this process and returns; a thread of Ray's
own carries it to the port, so a step never waits for whoever looks. Ray forgets a gauge that is not set again within
some 20 s; a thread here repeats the newest window, so that a run that stalls goes on showing when it last moved, and
one that has ended shows nothing. Prometheus sees `ray_<name>`, a counter as `ray_<name>_total`; dashboard and alerts
in `infra/` are written for these names.
"""

from __future__ import annotations

import threading
import time

from ray.util.metrics import Counter, Gauge, Histogram

GAUGES = {
    "train/loss": ("itpn_loss", "loss of the newest step"),
    "train/images_per_second": ("itpn_images_per_second", "images per second of all workers"),
    "train/mfu": ("itpn_mfu", "share of the devices' stated peak, 0 to 1"),
    "data/wait_fraction": ("itpn_data_wait_fraction", "share of time in which rank 0 had no batch, 0 to 1"),
    "data/bad_samples": ("itpn_bad_samples", "damaged samples left out so far, as of the newest checkpoint"),
    "tracking/lost_records": ("itpn_lost_records", "records that the journal's disk did not take; the run ends"),
    "train/refused_steps": ("itpn_refused_steps", "steps so far whose gradient or loss was not finite or spiked"),
    "checkpoint/write_seconds": ("itpn_checkpoint_write_seconds", "time to write the newest committed checkpoint"),
    "checkpoint/blocked_seconds": ("itpn_checkpoint_blocked_seconds", "time the newest save held up the step"),
    "checkpoint/failing": ("itpn_checkpoint_failing", "1 while the newest save has failed, else 0"),
    "checkpoint/failed": ("itpn_checkpoint_failures", "saves that failed since the workers started"),
    "goodput/restarts": ("itpn_restarts", "restarts of the run so far"),
    "goodput/share/compute": ("itpn_goodput", "share of all worker time that went into steps that count, 0 to 1"),
}
"""Name in the journal -> (name here, meaning)."""
STEP, WINDOW_TIME = "itpn_step", "itpn_window_time_seconds"
PROGRESS_TIME = "itpn_progress_time_seconds"
STEP_SECONDS, STEPS = "itpn_step_seconds", "itpn_steps"
BOUNDARIES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0, 300.0]


class _Repeated:
    """Gauges that are set again and again until `close`, so that Ray does not forget them."""

    def __init__(self, repeat_s: float) -> None:
        self._newest: list[tuple[Gauge, float]] = []
        self._repeat_s = repeat_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the repetition; the gauges go."""
        self._end.set()
        self._thread.join(timeout=10)

    def _show(self) -> None:
        for gauge, value in self._newest:
            gauge.set(value)

    def _repeat(self) -> None:
        while not self._end.wait(self._repeat_s):
            self._show()


class DriverMetrics(_Repeated):
    """When the run last took a step, as its driver knows it: also while no worker is there to tell.

    Args:
        run: name of the run.
        repeat_s: as for `TrainingMetrics`.
    """

    def __init__(self, run: str, repeat_s: float = 5.0) -> None:
        words = "when the driver last heard of a new step, or started, Unix time"
        self._gauge = Gauge(PROGRESS_TIME, words, ("run",)).set_default_tags({"run": run})
        self._step = -1
        super().__init__(repeat_s)
        self.heard(0)

    def heard(self, step: int) -> None:
        """Takes note of the step that the run is at; called about twice a second."""
        if step != self._step:
            self._step = step
            self._newest = [(self._gauge, time.time())]


class TrainingMetrics(_Repeated):
    """The metrics of one run, held by its rank 0.

    Args:
        run: name of the run, the only label of ours.
        repeat_s: seconds between two repetitions; less than Ray's `metrics_report_interval_ms` (10 s).
    """

    def __init__(self, run: str, repeat_s: float = 5.0) -> None:
        tags = {"run": run}
        self._gauges = {
            source: Gauge(name, help_text, ("run",)).set_default_tags(tags)
            for source, (name, help_text) in GAUGES.items()
        }
        self._step = Gauge(STEP, "optimizer steps done", ("run",)).set_default_tags(tags)
        self._time = Gauge(WINDOW_TIME, "when the newest window ended, Unix time", ("run",)).set_default_tags(tags)
        self._steps = Counter(STEPS, "steps taken, redone ones included", ("run",)).set_default_tags(tags)
        self._seconds = Histogram(
            STEP_SECONDS, "time per step, mean of each window", BOUNDARIES, ("run",)
        ).set_default_tags(tags)
        super().__init__(repeat_s)

    def window(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Shows what one window measured.

        Args:
            step: optimizer steps done so far.
            steps: of this window, at least one.
            values: by their names in the journal; those not in `GAUGES` are not shown here.
        """
        self._steps.inc(steps)
        self._seconds.observe(values["train/seconds_per_step"])
        measured = [(gauge, values[source]) for source, gauge in self._gauges.items() if source in values]
        # Replaced, not changed: the other thread may be reading it.
        self._newest = [(self._step, step), (self._time, time.time()), *measured]
        self._show()
