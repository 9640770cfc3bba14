"""What runs in each Ray Train worker: its surroundings for the engine, then the engine."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train.v2._internal.execution.context import get_train_context

from itpn_core.errors import UserError
from orchestrator.checkpoint.runlog import FencedError
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import DataError, DataGoneError, StorageGoneError
from orchestrator.data.folder import Folder
from orchestrator.launch.board import Admission, BoardClient, Progress
from orchestrator.launch.cli import EXIT_FAILED, EXIT_HELD, EXIT_STORAGE, EXIT_USAGE
from orchestrator.launch.failure import Complaint, last_line
from orchestrator.launch.metrics import TrainingMetrics
from orchestrator.launch.nodes import Question, check_here
from orchestrator.launch.place import local_directory
from orchestrator.train.context import CLOSING, PREEMPTED, REFUSED
from orchestrator.train.loop import train
from orchestrator.train.results import Request, Result

_BOARD_S = 10.0


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
    term: int = 0
    """Fencing number of the driver; 0 when it holds no lease."""
    question: Question | None = None
    """What a worker asks its node before it starts; None = nothing."""


class RayContext:
    """One Ray Train worker as the engine sees it (`orchestrator.train.context.RunContext`).

    Args:
        assignment: from the driver.
        open_s: for how many seconds the driver has been starting groups.
    """

    def __init__(self, assignment: Assignment, open_s: float = 0.0) -> None:
        # Ray may hand out a process that waited in reserve from before the run.
        self.began_at = max(time.time() - open_s, psutil.Process().create_time())
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.local_world: int = context.get_local_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.folder = Folder(assignment.folder_uri, assignment.config.data.store)
        self.directory = local_directory(self.folder, assignment.run_uid)
        self.run_uid = assignment.run_uid
        self.attempt = assignment.attempt
        self.term = assignment.term
        self.facts = {**assignment.facts, "world_size": str(self.world)}
        self._board = BoardClient(assignment.board) if self.rank == 0 else None
        self._metrics = TrainingMetrics(assignment.config.run.name) if self.rank == 0 else None
        self._told = False

    def progress(
        self, stage: str, *, step: int = 0, total: int = 0, epoch: int = 0, loss: float = 0.0, speed: float = 0.0,
        seconds_per_step: float = 0.0,
    ) -> None:  # fmt: skip
        """As `RunContext.progress`."""
        if self._board:
            if not self._told and stage not in (CLOSING, REFUSED):
                self._told = True
                self._board.state("resumed" if step else "running", f"step {step}, {self.world} workers")
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
        """As `RunContext.stop_reason`; a notice that a node will be taken away is a reason too."""
        return self._board.stop_reason or preemption_notice() if self._board else ""

    def report(self, metrics: dict[str, float], checkpoint_step: int) -> None:
        """As `RunContext.report`: Ray Train gets numbers; the checkpoint itself is our own store's."""
        ray.train.report({**metrics, "checkpoint_step": float(checkpoint_step)})

    def ask_evaluation(self, request: Request) -> None:
        """As `RunContext.ask_evaluation`: the driver sees to it."""
        if self._board:
            self._board.ask(request)

    def evaluated(self) -> list[Result]:
        """As `RunContext.evaluated`."""
        return self._board.evaluated() if self._board else []

    def close(self) -> None:
        """Sends the last progress, and shows no more numbers."""
        if self._board:
            self._board.close()
        if self._metrics:
            self._metrics.close()


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    assignment: Assignment = loop_config["assignment"]
    threads = assignment.config.train.threads or granted_cpus()
    torch.set_num_threads(threads)
    admission = _ask(assignment.board.admit.remote()) or Admission()
    if admission.refusal:
        return {"refused": admission.refusal, "exit": admission.exit_code}
    _check_node(assignment)
    time.sleep(admission.wait_s)
    run = RayContext(assignment, admission.open_s)
    try:
        return {"outcome": asdict(train(assignment.config, run))}
    except DataGoneError as error:
        # One rank's trouble: it ends the group by failing, and groups after it by what it leaves on the board.
        _ask(assignment.board.refuse.remote(str(error), EXIT_STORAGE))
        _complain(assignment.board, run.rank, error)
        raise
    except StorageGoneError as error:
        return _refused(assignment.board, run, error, EXIT_STORAGE)
    except FencedError as error:
        return _refused(assignment.board, run, error, EXIT_HELD)
    except DataError as error:
        _complain(assignment.board, run.rank, error)
        raise  # may be one rank's storage trouble, which a restart can cure
    except UserError as error:
        return _refused(assignment.board, run, error, EXIT_FAILED)
    except Exception as error:
        _complain(assignment.board, run.rank, error)
        raise
    finally:
        run.close()


def _refused(board: Any, run: RayContext, error: UserError, code: int) -> dict[str, Any]:
    """What a rank returns that says what is wrong instead of failing: a restart would find it again.

    Mostly every rank finds the same. Where one is alone with it, the others wait for it in a collective call, and the
    driver, which finds the words on the board, ends the group.
    """
    run.progress(REFUSED)
    _ask(board.refuse.remote(f"rank {run.rank} on {socket.gethostname()}: {error}", code))
    return {"refused": str(error), "exit": code}


def _check_node(assignment: Assignment) -> None:
    """Ends the run when this node, which may have come after the driver asked all others, cannot take part.

    One rank's trouble: it ends the group by failing, and groups after it by what it leaves on the board.

    Raises:
        UserError: what is wrong with the node.
    """
    trouble = check_here(assignment.question) if assignment.question else ""
    if trouble:
        error = UserError(trouble)
        _ask(assignment.board.refuse.remote(trouble, EXIT_USAGE))
        _complain(assignment.board, ray.train.get_context().get_world_rank(), error)
        raise error


def preemption_notice() -> str:
    """A notice that a node of this group will be taken away; "" without one.

    `ray.train.get_preemption_info` hands out rank 0's copy of the notice after a barrier of all ranks, at every call.
    Here rank 0 looks at that copy itself, and the other ranks learn of it as of every stop request.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    until = ""
    if info.deadline_ms:
        until = time.strftime(" until %H:%M:%S UTC", time.gmtime(info.deadline_ms / 1000))
    ranks = ", ".join(map(str, info.preempted_ranks))
    return f"{PREEMPTED}: the node of rank {ranks} is there only{until or ' a little longer'}"


def _complain(board: Any, rank: int, error: BaseException) -> None:
    """Tells the board before anybody else can fail because of this rank."""
    text = last_line(str(error)) or type(error).__name__
    words = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    _ask(board.complain.remote(Complaint(rank, socket.gethostname(), words)))


def _ask(reference: Any) -> Any:
    """The board's answer; None when it cannot be reached, for the run does not depend on it."""
    try:
        return ray.get(reference, timeout=_BOARD_S)
    except RayError:
        return None


def granted_cpus() -> int:
    """CPUs that Ray gave this process, at least one."""
    granted = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    return max(1, min(int(granted), len(os.sched_getaffinity(0))))
