"""What runs in each Ray Train worker: its surroundings for the engine, then the engine."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch

from itpn_core.errors import UserError
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import DataError, StorageGoneError
from orchestrator.data.folder import Folder
from orchestrator.launch.board import BoardClient, Progress
from orchestrator.launch.cli import EXIT_FAILED, EXIT_STORAGE
from orchestrator.launch.metrics import TrainingMetrics
from orchestrator.launch.place import local_directory
from orchestrator.train.loop import train


@dataclass(frozen=True)
class Assignment:
    """What the driver sends to every worker."""

    config: JobConfig
    folder_uri: str
    run_uid: str
    attempt: int
    board: Any
    """Handle of the noticeboard actor."""
    facts: dict[str, str]
    """What only the driver knows (git commit, recipe text …), for the run's tags."""


class RayContext:
    """One Ray Train worker as the engine sees it (`orchestrator.train.context.RunContext`)."""

    def __init__(self, assignment: Assignment) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.local_world: int = context.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.folder = Folder(assignment.folder_uri, assignment.config.data.store)
        self.directory = local_directory(self.folder, assignment.run_uid)
        self.run_uid = assignment.run_uid
        self.attempt = assignment.attempt
        self.facts = {**assignment.facts, "world_size": str(self.world)}
        self._board = BoardClient(assignment.board) if self.rank == 0 else None
        self._metrics = TrainingMetrics(assignment.config.run.name) if self.rank == 0 else None

    def progress(
        self, stage: str, *, step: int = 0, total: int = 0, epoch: int = 0, loss: float = 0.0, speed: float = 0.0,
        seconds_per_step: float = 0.0,
    ) -> None:  # fmt: skip
        """As `RunContext.progress`."""
        if self._board:
            self._board.post(Progress(stage, step, total, epoch, loss, speed, seconds_per_step))

    def measured(self, step: int, steps: int, values: dict[str, float]) -> None:
        """As `RunContext.measured`."""
        if self._metrics:
            self._metrics.window(step, steps, values)

    def note(self, text: str) -> None:
        """As `RunContext.note`."""
        if self._board:
            self._board.note(text)

    def stop_reason(self) -> str:
        """As `RunContext.stop_reason`."""
        return self._board.stop_reason if self._board else ""

    def report(self, metrics: dict[str, float], checkpoint_step: int) -> None:
        """As `RunContext.report`: Ray Train gets numbers; the checkpoint itself is our own store's."""
        ray.train.report({**metrics, "checkpoint_step": float(checkpoint_step)})

    def close(self) -> None:
        """Sends the last progress."""
        if self._board:
            self._board.close()


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    assignment: Assignment = loop_config["assignment"]
    threads = assignment.config.train.threads or _granted_cpus()
    torch.set_num_threads(threads)
    run = RayContext(assignment)
    try:
        return {"outcome": asdict(train(assignment.config, run))}
    except DataError:
        raise  # may be one rank's storage trouble, which a restart can cure
    except StorageGoneError as error:
        return {"refused": str(error), "exit": EXIT_STORAGE}
    except UserError as error:
        # Every rank finds the same mistake, and a restart would find it again: say it instead of retrying.
        return {"refused": str(error), "exit": EXIT_FAILED}
    finally:
        run.close()


def _granted_cpus() -> int:
    """CPUs that Ray gave this worker, at least one."""
    granted = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    return max(1, min(int(granted), len(os.sched_getaffinity(0))))
