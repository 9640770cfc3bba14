"""Evaluations as Ray tasks beside the training group: at most one, on what the group does not use.

Not Ray Train's own validation function: that one hangs on checkpoints reported to Ray Train, whose storage every node
would have to reach, and its task waits for resources without regard to the group (docs/training.md).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from itpn_core.errors import UserError
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import DataError
from orchestrator.data.folder import Folder
from orchestrator.launch.background import Rounds, background
from orchestrator.launch.cluster import Resources, fits_beside, free_nodes, room_beside
from orchestrator.launch.desk import Desk, GoneError
from orchestrator.launch.place import local_directory
from orchestrator.launch.say import say
from orchestrator.launch.worker import granted_cpus
from orchestrator.train.apart import Measured, measure
from orchestrator.train.context import Silent
from orchestrator.train.results import Request

_LOOK_S = 1.0
_FETCH_S = 30.0
_WAITS = ("PENDING", "PREPARED", "RESCHEDULING")


@dataclass(frozen=True)
class Job:
    """What a task needs besides its request."""

    config: JobConfig
    folder_uri: str
    run_uid: str
    attempt: int


def resolve_where(where: str, resources: Resources) -> tuple[str, str]:
    """Where evaluations of a run are made ("inside" or "beside"), and the reason in words.

    Raises:
        UserError: beside is asked for, and the cluster can never hold the workers and an evaluation.
    """
    one = f"{resources.bundle} beside {resources.workers} workers"
    if where == "inside":
        return "inside", "between steps, as eval.where says"
    if where == "beside":
        if not room_beside(resources):
            raise UserError(
                f"eval.where=beside needs {one}, and the cluster has no room for that: use eval.where=auto (beside"
                " where there is room), fewer cluster.workers or cluster.cpus_per_worker, or add a node"
            )
        return "beside", f"on {one}"
    if fits_beside([free for free, _ in free_nodes()], resources):
        return "beside", f"on {one}, which are free"
    return "inside", f"between steps, as no {resources.bundle} is free beside {resources.workers} workers"


class RayRunner:
    """Runs evaluations as tasks with the resources of one worker (`orchestrator.launch.desk.Runner`).

    Args:
        job: what they measure.
        resources: of a worker.
    """

    def __init__(self, job: Job, resources: Resources) -> None:
        self._job, self._resources = job, resources

    def room(self) -> bool:
        """As `Runner.room`: the training group stands, and a node has room besides."""
        return not self.claimed() and any(fits for _, fits in free_nodes(self._resources))

    def claimed(self) -> bool:
        """As `Runner.claimed`: a placement group of this job, which only training groups have, is not placed yet."""
        job = ray.get_runtime_context().get_job_id()
        groups = ray.util.placement_group_table().values()
        return any(group["state"] in _WAITS for group in groups if group["placement_group_id"].endswith(job))

    def start(self, request: Request, colours: Any) -> Any:
        """As `Runner.start`. A process of its own: it leaves no memory behind on the device."""
        task = ray.remote(
            num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, max_retries=0, max_calls=1,
            accelerator_type=self._resources.accelerator or None, scheduling_strategy="DEFAULT",
        )(evaluate_apart)  # fmt: skip
        return task.remote(self._job, request, colours, self._resources.gpus)

    def poll(self, task: Any) -> Measured | None:
        """As `Runner.poll`; trouble with storage may pass, so it counts as gone."""
        ready, _ = ray.wait([task], timeout=0)
        if not ready:
            return None
        try:
            found: Measured = ray.get(task, timeout=_FETCH_S)
        except DataError as error:
            raise GoneError(str(error).strip().splitlines()[-1]) from error
        except RayTaskError:
            raise
        except RayError as error:
            raise GoneError(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}") from error
        return found

    def stop(self, task: Any) -> None:
        """As `Runner.stop`."""
        ray.cancel(task, force=True)


def evaluate_apart(job: Job, request: Request, colours: Any, gpus: int) -> Measured:
    """Runs in a task."""
    torch.set_num_threads(granted_cpus())
    folder = Folder(job.folder_uri, job.config.data.store)
    directory = local_directory(folder, job.run_uid)
    directory.mkdir(parents=True, exist_ok=True)
    run = Silent(directory, device=torch.device("cuda" if gpus else "cpu"))
    run.folder, run.run_uid, run.attempt = folder, job.run_uid, job.attempt
    return measure(job.config, run, request, colours)


@contextlib.contextmanager
def looking(desk: Desk) -> Iterator[None]:
    """Lets a desk look after its evaluations on a thread, until the block ends."""

    def run(done: threading.Event) -> None:
        rounds = Rounds("the watch over evaluations")
        while not done.wait(_LOOK_S):
            with rounds.one(), contextlib.suppress(RayError):  # a cluster that does not answer now: the next look tells
                desk.look()

    try:
        with background("evaluations", run):
            yield
    finally:
        with contextlib.suppress(RayError):
            left = desk.close()
            if left:
                steps = ", ".join(map(str, sorted(left)))
                say(f"evaluations that were not done: step {steps}; done when the run goes on")
