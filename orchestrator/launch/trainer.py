"""One Ray Train run: the resources, the retries and the callbacks of a worker group."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.cluster import Resources
from orchestrator.launch.nodes import Question
from orchestrator.launch.place import local_directory
from orchestrator.launch.record import RunRecord
from orchestrator.launch.worker import Assignment, train_worker

_COLLECTIVE_S = 1800.0
"""Ray Train's own limit of a collective call."""
GROUP_STARTS = 4
"""How often Ray Train waits for room for a group before it gives up."""


class _Failures(UserCallback):  # type: ignore[misc]
    """Tells the board which ranks have failed. Lives in Ray Train's controller.

    Args:
        board: the noticeboard.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """As Ray Train calls it."""
        with contextlib.suppress(RayError):  # a driver that is gone has no use for it
            errors = {rank: str(error) or type(error).__name__ for rank, error in worker_exceptions.items()}
            ray.get(self._board.failed.remote(errors), timeout=10)


def collective_timeout_s(config: JobConfig) -> int:
    """How long a rank waits for the others in one call: longer than any of them may rightly take.

    At the end rank 0 may try to save for `checkpoint.max_age_s`. Ranks that hang are the watchdog's, long before.
    """
    patient = (config.checkpoint.max_age_s, config.checkpoint.stop_deadline_s, config.data.store.give_up_s)
    return int(max(_COLLECTIVE_S, *patient) + _COLLECTIVE_S)


def make_trainer(
    config: JobConfig,
    resources: Resources,
    folder: Folder,
    record: RunRecord,
    facts: dict[str, str],
    board: Any,
    callbacks: Sequence[UserCallback] = (),
    *,
    term: int = 0,
    part: int = 1,
    question: Question | None = None,
) -> TorchTrainer:
    """The Ray Train run of one attempt.

    Args:
        config: resolved configuration.
        resources: of each worker.
        folder: the run's.
        record: of the run, with this attempt counted.
        facts: what only the driver knows, for the run's tags.
        board: the noticeboard between driver and workers.
        callbacks: told of every report, in Ray Train's controller.
        term: fencing number of the driver; 0 when it holds no lease.
        part: number of this Ray Train run within the attempt, from 1; a preempted one is followed by another.
        question: what a worker asks its node before it starts, when that is not the driver's; None = nothing.
    """
    assignment = Assignment(config, folder.uri, record.run_uid, record.attempts, board, facts, term, question)
    low, high = resources.min_workers, resources.workers
    return TorchTrainer(
        train_worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=bool(resources.gpus),
            resources_per_worker=resources.bundle,
            accelerator_type=resources.accelerator or None,
            elastic_resize_monitor_interval_s=config.cluster.resize_s,
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo", timeout_s=collective_timeout_s(config)),
        run_config=RunConfig(
            # Ray's own record of the start stays on the driver's host, where its controller runs: what is resumed from
            # is our committed checkpoint on run storage, so Ray needs no storage that every host reaches.
            name=f"ray-{record.attempts:04d}-{part:02d}",
            storage_path=str(local_directory(folder, record.run_uid) / "ray"),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=GROUP_STARTS - 1
            ),
            callbacks=[_Failures(board), *callbacks],
        ),
    )
