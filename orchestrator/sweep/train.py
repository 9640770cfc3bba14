"""Mode "train": each trial pre-trains through the same engine, on Ray Train inside the Tune trial.

A trial is an ordinary run in `<sweep>/runs/trial-0012`: it resumes from its own checkpoints when it, its host or the
driver dies. At every evaluation after the start (a rung) its values go to the journal, and it is asked to stop when
even its optimistic bound is beaten (`pruning.py`); the engine then saves and ends, so nothing has to be killed.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from itpn_core.errors import ConfigError, UserError
from orchestrator.config.identity import result_fields
from orchestrator.config.tree import PretrainConfig, SweepJobConfig, pretrain_part, with_where
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.evaluate.subject import flops_of
from orchestrator.launch.board import open_board
from orchestrator.launch.check import check
from orchestrator.launch.cli import EXIT_STORAGE
from orchestrator.launch.cluster import Resources, ready_for_train
from orchestrator.launch.failure import root_cause
from orchestrator.launch.record import KEY, RunRecord, open_record
from orchestrator.launch.trainer import make_trainer
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.front import gains
from orchestrator.sweep.journal import End, TrialJournal, trial_uid
from orchestrator.sweep.known import FINISHED, PRUNED, Trial
from orchestrator.sweep.legal import with_fields
from orchestrator.sweep.pruning import should_stop
from orchestrator.sweep.queue import resting_rungs
from orchestrator.sweep.state import OutOfMemory, measured
from orchestrator.train.context import PREEMPTED

OBJECTIVES = ("accuracy", "gflops")
TOP1 = "eval/knn_top1"
SHARE = 0.95
"""Of the CPUs that a worker asks for: what is left lets the waiting trials fit on the same node."""
BEATEN = "pruned: its optimistic bound is dominated by the front"
RESTS = "rests: others go on first"
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def check_train(config: SweepJobConfig) -> None:
    """Refuses what a training sweep cannot do.

    Raises:
        ConfigError: an objective that would need a device without neighbours, or no rung.
    """
    for name in config.sweep.objectives:
        if name not in OBJECTIVES:
            raise ConfigError(
                "sweep.objectives", name, f"a training sweep has {' and '.join(OBJECTIVES)}",
                "Trials train side by side, so speed is counted in FLOPs; measure it afterwards with mode=measure.",
            )  # fmt: skip
    if config.eval.every_epochs < 1 or config.eval.every_epochs > config.train.epochs:
        raise ConfigError(
            "eval.every_epochs", config.eval.every_epochs, "a training sweep needs an evaluation per rung"
        )


def trial_config(config: SweepJobConfig, folder: Folder, trial: Trial) -> PretrainConfig:
    """The run that a trial is: the recipe's with the trial's fields, in a folder of its own."""
    # Rungs are the reports of evaluations, and nothing is free beside trials.
    plain = with_where(with_fields(pretrain_part(config), trial.setting.fields), "inside")
    return replace(plain, run=replace(plain.run, name=f"trial-{trial.number:04d}", storage=f"{folder.uri}/runs"))


class Rungs(UserCallback):  # type: ignore[misc]
    """Takes a trial's evaluations to the journal and asks it to stop when it is beaten. Lives in Train's controller.

    Args:
        folder_uri: the sweep's folder.
        store: how it is reached.
        number: of the trial.
        sweep: settings of the sweep.
        gflops: of the trial's model; does not change while it trains.
        length: rungs of a complete training; 0 = unknown, and no trial rests.
        begun: rungs that it had reached before this piece of its training.
        board: noticeboard that the trial's rank 0 reads.
    """

    def __init__(
        self, folder_uri: str, store: StoreConfig, number: int, sweep: SweepConfig, gflops: float,
        length: int, begun: int, board: Any,
    ) -> None:  # fmt: skip
        self._place, self._number, self._sweep = (folder_uri, store), number, sweep
        self._gflops, self._length, self._begun, self._board = gflops, length, begun, board

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: object) -> None:
        """As Ray Train calls it; evaluations of the untrained student are no rung."""
        found = metrics[0]
        if TOP1 not in found or not found.get("step"):
            return
        journal = TrialJournal(Folder(*self._place))
        values = {"accuracy": float(found[TOP1]), "gflops": self._gflops}
        rung = journal.rung(self._number, int(found["step"]), values)
        if beaten(values, rung, journal.finished_curves(), self._sweep):
            ray.get(self._board.stop.remote(BEATEN))
        elif rung >= self._begun and rung in resting_rungs(self._length):
            ray.get(self._board.stop.remote(RESTS))


def rungs_of(config: SweepJobConfig) -> int:
    """Evaluations after the start of a complete training; 0 when the recipe does not say (`train.max_steps`)."""
    return 0 if config.train.max_steps else math.ceil(config.train.epochs / config.eval.every_epochs)


def beaten(values: Mapping[str, float], rung: int, curves: list[list[dict[str, float]]], sweep: SweepConfig) -> bool:
    """Whether a trial should stop at a rung; never at the last one, where it has finished.

    Args:
        values: of the trial at the rung.
        rung: 0-based.
        curves: of trials that were trained to their end.
        sweep: objectives.
    """
    goals = sweep.goals()
    length = max((len(curve) for curve in curves), default=0)
    if rung + 1 >= length:
        return False
    finished = [gains(curve, goals) for curve in curves if len(curve) == length]
    return should_stop(gains([values], goals)[0], rung, finished)


def train_setting(config: SweepJobConfig, folder: Folder, trial: Trial) -> End | None:
    """Trains one trial from its last checkpoint, to its end or to where it rests (None).

    Args:
        config: resolved configuration of the sweep.
        folder: the sweep's.
        trial: what to train.

    Raises:
        OutOfMemory: a worker needed more than there is.
        UserError: the setting cannot be trained.
    """
    begun = time.time()
    journal = TrialJournal(folder)
    curve = journal.curve(trial.number)
    if curve and beaten(curve[-1], len(curve) - 1, journal.finished_curves(), config.sweep):
        return measured(PRUNED, curve[-1], {"curve": curve, "stopped": BEATEN}, begun)
    ready_for_train(config.cluster)
    plain = trial_config(config, folder, trial)
    run_folder = Folder(f"{plain.run.storage}/{plain.run.name}", plain.data.store)
    checked = check(plain)
    fields = {**result_fields(plain, checked.manifest.fingerprint), **checked.inputs}
    queries = plain.eval.queries or checked.manifest.split(plain.data.val_split).samples
    record = open_record(run_folder, fields, plain.run.name)
    if not record.attempts:
        record = replace(record, run_uid=trial_uid(_sweep_uid(folder), trial.number))
    record = record.next_attempt()
    record.save(run_folder)
    reduction = plain.model.migration, plain.model.gathering
    gflops = flops_of(plain.model, plain.model.img_size, reduction) / 1e9
    board = open_board(plain.cluster.max_failures)
    callback = Rungs(
        folder.uri, plain.data.store, trial.number, config.sweep, gflops, rungs_of(config), len(curve), board
    )
    outcome = _to_its_end(lambda part: _fit(plain, run_folder, record, board, callback, part))
    curve = journal.curve(trial.number)
    if outcome["stopped"] == RESTS:
        return None
    if not curve:
        raise RuntimeError("the trial ended without an evaluation")
    state = PRUNED if outcome["stopped"] else FINISHED
    if state == FINISHED:
        replace(record, finished=True, summary=outcome).save(run_folder)
    details = {
        "curve": curve,
        "standard_error": math.sqrt(curve[-1]["accuracy"] * (1 - curve[-1]["accuracy"]) / queries),
        "step": outcome["step"],
        "stopped": outcome["stopped"],
    }
    return measured(state, curve[-1], details, begun)


def _sweep_uid(folder: Folder) -> str:
    return str(json.loads(folder.get(KEY))["run_uid"])


def _to_its_end(fit: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Trains until the trial ends for another reason than a node that is taken away; `fit` gets numbers from 1."""
    for part in itertools.count(1):
        outcome = fit(part)
        if not outcome["stopped"].startswith(PREEMPTED):
            break
    return outcome


def _fit(
    plain: PretrainConfig, folder: Folder, record: RunRecord, board: Any, callback: Rungs, part: int
) -> dict[str, Any]:
    facts = {"recipe": "sweep", "run.kind": "trial"}
    trainer = make_trainer(plain, worker_resources(plain), folder, record, facts, board, [callback], part=part)
    try:
        returned: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        cause = root_cause(error)
        if any(text in cause.lower() for text in _OUT_OF_MEMORY):
            raise OutOfMemory(cause) from None
        raise RuntimeError(cause) from None
    if "refused" in returned:
        raise (StorageGoneError if returned["exit"] == EXIT_STORAGE else UserError)(returned["refused"])
    outcome: dict[str, Any] = returned["outcome"]
    return outcome


def worker_resources(plain: PretrainConfig) -> Resources:
    """Resources of a trial's workers; a shade less CPU than asked, so that the waiting trials fit beside them."""
    use_gpu = plain.cluster.device == "cuda" or (
        plain.cluster.device == "auto" and ray.cluster_resources().get("GPU", 0) >= plain.cluster.workers
    )
    return Resources(plain.cluster.workers, plain.cluster.cpus_per_worker * SHARE, 1 if use_gpu else 0)
