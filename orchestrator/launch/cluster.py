"""Connecting to Ray, and finding out in seconds whether the cluster can ever run what is asked."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from itpn_core.errors import UserError
from orchestrator.launch.config import ClusterConfig


@dataclass(frozen=True)
class Resources:
    """What each worker gets."""

    workers: int
    cpus: float
    gpus: int
    workers_min: int = 0
    """Fewest workers to go on with; 0 = all."""

    @property
    def min_workers(self) -> int:
        """Fewest workers to go on with."""
        return self.workers_min or self.workers

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker in Ray's words."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Joins the cluster that `RAY_ADDRESS` names (set inside a submitted job), else starts Ray on this machine.

    Raises:
        UserError: the cluster cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    ready_for_train(config)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            cpus = max(os.cpu_count() or 1, int(config.workers * config.cpus_per_worker + 0.999))
            ray.init(
                address="local",
                num_cpus=cpus if config.device != "cuda" else None,
                include_dashboard=False,
                log_to_driver=False,
                # Ray warns that token authentication is on; it is what docs/security.md says.
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise UserError(f"cannot connect to {where}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        _leave()


def _leave() -> None:
    """Leaves the cluster.

    Once, a driver ended within Ray's shutdown ("core worker has already been shutdown") and its end table was lost. Ray
    checks the connection before it lets go of a handle, and that check races with the shutdown when another thread's
    garbage collection frees one. So garbage goes first, and no collection runs meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def ready_for_train(config: ClusterConfig) -> None:
    """Sets, in the process that starts Ray Train, what its controller reads from the environment only."""
    # The controller looks at its workers this often; at Ray's 2 s a short run spends its time waiting for reports.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.start_timeout_s))
    # A notice that a node will be taken away counts in seconds: clouds give 30 to 120 of them.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")


def request(config: ClusterConfig) -> Resources:
    """Resources per worker, checked against what the connected cluster could ever give.

    Raises:
        UserError: the cluster is too small; the message says what is asked and what is there.
    """
    have = ray.cluster_resources()
    growing = _limits_of_autoscaler()
    gpus = int(max(have.get("GPU", 0), growing.get("GPU", 0)))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    asked = Resources(config.workers, config.cpus_per_worker, 1 if use_gpu else 0, config.workers_min)
    least = asked.min_workers
    key = "cluster.workers_min" if config.workers_min else "cluster.workers"
    if use_gpu and gpus < least:
        raise UserError(
            f"{key}={least} needs {least} GPUs, the cluster has {gpus}: "
            f"set {key}={gpus or 1}{'' if gpus else ' and cluster.device=cpu'}, or add nodes"
        )
    room = sum(_workers_that_fit(node["Resources"], asked) for node in _nodes())
    if max(room, _workers_that_fit(growing, asked) if growing else 0) < least:
        raise UserError(
            f"{key}={least} with cluster.cpus_per_worker={config.cpus_per_worker:g} needs "
            f"{least * config.cpus_per_worker:g} CPUs; the cluster has {have.get('CPU', 0):g} "
            f"and room for {room} such workers. Ask for fewer workers or CPUs, or add nodes"
        )
    return asked


def room_beside(asked: Resources) -> bool:
    """Whether the cluster could ever hold all workers and one task like a worker."""
    if fits_beside([dict(node["Resources"]) for node in _nodes()], asked):
        return True
    growing = _limits_of_autoscaler()
    return bool(growing) and _workers_that_fit(growing, asked) > asked.workers


def free_nodes(asked: Resources | None = None) -> list[tuple[dict[str, float], bool]]:
    """What every living node has free now, and whether a task like a worker fits there."""
    free = ray._private.state.available_resources_per_node()
    mine = [dict(free.get(node["NodeID"], {})) for node in _nodes()]
    return [(node, asked is not None and _workers_that_fit(node, asked) > 0) for node in mine]


def fits_beside(nodes: list[dict[str, float]], asked: Resources) -> bool:
    """Whether these nodes hold all workers and, on one of them, one task like a worker."""
    counts = [_workers_that_fit(node, asked) for node in nodes]
    less = {name: amount for name, amount in asked.bundle.items() if amount}
    for node, count in zip(nodes, counts, strict=True):
        left = {name: amount - less.get(name, 0.0) for name, amount in node.items()}
        if count and sum(counts) - count + _workers_that_fit(left, asked) >= asked.workers:
            return True
    return False


def _limits_of_autoscaler() -> dict[str, float]:
    """The most that nodes which are still to come could bring; empty where the cluster does not grow by itself."""
    found = ray._private.state.state.get_max_resources_from_cluster_config()
    return {name: float(amount) for name, amount in (found or {}).items()}


def fitting_nodes(resources: Resources) -> list[dict[str, Any]]:
    """Nodes, in Ray's words, that have room for a worker when nothing else runs there."""
    return [node for node in _nodes() if _workers_that_fit(node["Resources"], resources)]


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _workers_that_fit(node: dict[str, float], asked: Resources) -> int:
    fits = [int(node.get(name, 0) / amount) for name, amount in asked.bundle.items() if amount]
    return min(fits) if fits else asked.workers
