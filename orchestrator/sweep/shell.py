"""The Ray Tune side of a sweep: a searcher over our own state, and trials that cannot take the sweep down with them.

Tune decides when a trial may start; what runs, what it came to and what is retried is decided by `state.py`. A trial
itself takes a hundredth of a CPU and waits for a task that holds the real resources, so trials can never starve the
work they wait for. The task may hang, die or exhaust its memory: it is killed, and the trial says so.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.exceptions import OutOfMemoryError as HostOutOfMemory
from ray.tune.search import Searcher

from itpn_core.errors import UserError
from orchestrator.config.tree import SweepJobConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.config import ClusterConfig
from orchestrator.sweep.journal import End, TrialJournal
from orchestrator.sweep.known import Trial
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.state import OutOfMemory, SweepState, TimedOut, run_trial

TRIAL_CPUS = 0.01
_TASK_CPUS = 0.9
_DEATH_S = 30.0
RESTS = "rests"


class MeasureFn(Protocol):
    """The work of one trial: a function of a module, so that workers can import it."""

    def __call__(self, config: SweepJobConfig, folder: Folder, trial: Trial) -> End | None:
        """Runs it to its end; None when it rests before."""


@dataclass(frozen=True)
class Placement:
    """How many trials run at a time and what the work of each one holds.

    Attributes:
        concurrent: trials at a time.
        cpus: of one trial's work.
        gpus: of one trial's work.
    """

    concurrent: int
    cpus: float
    gpus: float


def place(nodes: list[dict[str, float]], cluster: ClusterConfig) -> Placement:
    """Placement of measuring trials, of which no two may share a device.

    A GPU serves one trial; without GPUs one trial runs at a time, because neighbours on a CPU would disturb its timing.

    Args:
        nodes: resources of every living node.
        cluster: which device is wanted.

    Raises:
        UserError: the cluster has nothing that could run a trial.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    gpus = sum(int(min(node["GPU"], node["CPU"])) for node in with_gpu)
    if cluster.device == "cuda" and not gpus:
        raise UserError("cluster.device='cuda' but no node of the cluster has a GPU and a CPU: use cpu or auto")
    if cluster.device != "cpu" and gpus:
        return Placement(gpus, _TASK_CPUS, 1.0)
    if not any(node.get("CPU", 0) >= 1 for node in nodes):
        raise UserError("no node of the cluster has a CPU for a trial: start nodes with at least one CPU")
    return Placement(1, _TASK_CPUS, 0.0)


def place_training(nodes: list[dict[str, float]], cluster: ClusterConfig) -> Placement:
    """Placement of training trials: so many that the workers of all of them fit at the same time.

    Args:
        nodes: resources of every living node.
        cluster: workers of one trial and what each of them gets.

    Raises:
        UserError: not even one trial fits; the message says what is asked and what is there.
    """
    gpu = cluster.device == "cuda" or (cluster.device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes))

    def fitting(node: dict[str, float]) -> int:
        workers = int(node.get("CPU", 0) / cluster.cpus_per_worker)
        return min(workers, int(node.get("GPU", 0))) if gpu else workers

    room = sum(fitting(node) for node in nodes)
    if room < cluster.workers:
        raise UserError(
            f"a trial needs cluster.workers={cluster.workers} of cluster.cpus_per_worker={cluster.cpus_per_worker:g}"
            f"{' and a GPU' if gpu else ''}; the cluster has room for {room} such workers."
            " Ask for fewer workers or CPUs, or add nodes"
        )
    # The work of a trial is its Train workers; the task that waits for them holds next to nothing.
    return Placement(room // cluster.workers, TRIAL_CPUS, 0.0)


@dataclass(frozen=True)
class Work:
    """What every trial needs to know; travels to its worker."""

    config: SweepJobConfig
    folder_uri: str
    placement: Placement
    measure: MeasureFn
    slices: int = 1
    """Pieces in which a trial may run at most."""


class StateSearcher(Searcher):  # type: ignore[misc]
    """Tune's view of a `SweepState`."""

    def __init__(self, state: SweepState, on_end: Callable[[Trial, End], None]) -> None:
        super().__init__()
        self._state = state
        self._on_end = on_end
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's number, or that there is none: now, while others may come to rest, or at all."""
        trial = self._state.next()
        if trial is None:
            return None if self._numbers else str(Searcher.FINISHED)
        self._numbers[trial_id] = trial.number
        return {"number": trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the journal says what was measured."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Takes up the end from the journal, whatever became of Tune's trial."""
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        if result and result.get("state") == RESTS and not error:
            self._state.rest(number)
        else:
            self._on_end(self._state.trials[number], self._state.close(number))

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes a copy of the searcher for its own restore, which is never used: the journal is the state.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune's own record of the search; ours is the journal, so it holds nothing."""
        Path(checkpoint_path).write_bytes(pickle.dumps({}))

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def run_sweep(work: Work, state: SweepState, on_end: Callable[[Trial, End], None]) -> None:
    """Runs every trial that is left.

    Args:
        work: what trials need.
        state: decides which.
        on_end: called on this thread after each trial.
    """
    left = state.left
    if not left:
        return
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Tune misses its own result files of trials on other hosts and warns of each; what counts is in the journal.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # with it Tune prints boxes whatever `verbose` says
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(work.placement.concurrent))
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tune.Tuner(
            tune.with_resources(partial(_trial, work=work), {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=StateSearcher(state, on_end),
                # A trial that rests comes as another one of Tune's when it goes on.
                num_samples=left * work.slices,
                max_concurrent_trials=work.placement.concurrent,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                # A trial's actor that dies (its node went away) starts again; what it did is in the journal.
                failure_config=tune.FailureConfig(max_failures=2),
            ),
        ).fit()


def _trial(tune_config: Mapping[str, Any], work: Work) -> None:
    """Body of a Tune trial: waits for the work and leaves its end in the journal."""
    folder = Folder(work.folder_uri, work.config.data.store)
    journal = TrialJournal(folder)
    sweep = work.config.sweep
    trial = journal.trial(int(tune_config["number"]), parse_space(sweep.space, sweep.constraints))
    end = run_trial(journal, trial, partial(_in_task, work), sweep.retries)
    tune.report({"state": RESTS} if end is None else {"state": end.state, **end.values})


def _in_task(work: Work, trial: Trial) -> End | None:
    """The work of a trial in a process of its own, for as long as it may take."""
    placement = work.placement
    # Not in the placement group of the Tune trial, which holds a hundredth of a CPU.
    task = _measure.options(num_cpus=placement.cpus, num_gpus=placement.gpus, scheduling_strategy="DEFAULT").remote(
        work, trial.number
    )
    limit = work.config.sweep.timeout_s
    try:
        return ray.get(task, timeout=limit)  # type: ignore[no-any-return]
    except GetTimeoutError:
        ray.cancel(task, force=True)
        # The device must be free before anything else is measured on it.
        ray.wait([task], timeout=_DEATH_S)
        raise TimedOut(f"it took longer than sweep.timeout_s={limit:g}") from None
    except HostOutOfMemory as error:
        raise OutOfMemory(str(error).splitlines()[0]) from None
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except RayError as error:
        raise RuntimeError(f"the worker died: {str(error).splitlines()[0]}") from None


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _measure(work: Work, number: int) -> End | None:
    folder = Folder(work.folder_uri, work.config.data.store)
    sweep = work.config.sweep
    trial = TrialJournal(folder).trial(number, parse_space(sweep.space, sweep.constraints))
    return work.measure(work.config, folder, trial)
