"""Connecting to Ray, and finding out in seconds whether the cluster can ever run what is asked."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from itpn_core.errors import UserError
from orchestrator.launch.config import ClusterConfig
from orchestrator.launch.limits import VARIABLE, Group, autoscaler_runs, groups
from orchestrator.launch.say import say

_TYPE = "accelerator_type:"
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@dataclass(frozen=True)
class Resources:
    """What each worker gets."""

    workers: int
    cpus: float
    gpus: int
    workers_min: int = 0
    """Fewest workers to go on with; 0 = all."""
    accelerator: str = ""
    """Ray's name of the GPU type; "" = any."""

    @property
    def min_workers(self) -> int:
        """Fewest workers to go on with."""
        return self.workers_min or self.workers

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker in Ray's words."""
        found: dict[str, float] = {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}
        # A node with such GPUs has one of this resource; Ray Train asks every worker for as little of it.
        return {**found, f"{_TYPE}{self.accelerator}": 0.001} if self.accelerator else found

    def __str__(self) -> str:
        kind = f" {self.accelerator}" if self.accelerator else ""
        gpus = f"{self.gpus}{kind} GPU" if self.gpus else ""
        return " and ".join(filter(None, (f"{self.cpus:g} CPU", gpus)))


@contextmanager
def connected(config: ClusterConfig, loaders: int = 0) -> Iterator[None]:
    """Joins the cluster that `RAY_ADDRESS` names (set inside a submitted job), else starts Ray on this machine.

    Args:
        config: what the run asks of the cluster.
        loaders: decoding processes per worker.

    Raises:
        UserError: the cluster cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    ready_for_train(config)
    if address:
        settings: dict[str, Any] = {"address": address, "logging_level": logging.WARNING}
    else:
        cpus = max(os.cpu_count() or 1, int(config.workers * wanted_cpus(config, loaders) + 0.999))
        settings = {
            "address": "local",
            "num_cpus": cpus if config.device != "cuda" else None,
            "include_dashboard": False,
            # Ray warns that token authentication is on; it is what docs/security.md says.
            "logging_level": logging.ERROR,
        }
    # A stop raised inside Ray's `init` would leave a connection that aborts the process at its end. Handlers of signals
    # run in the main thread only, so `init` gets another one, where it does not set its own for SIGTERM either.
    thread = ThreadPoolExecutor(1, "ray-init", initializer=_block_hangups)
    try:
        _join(thread, settings)
        yield
    finally:
        thread.shutdown()  # waits for it; a second signal ends that, and nothing more is done
        _leave()


def _join(thread: ThreadPoolExecutor, settings: dict[str, Any]) -> None:
    """Ray's `init` in that thread.

    Raises:
        UserError: the cluster cannot be reached.
    """
    logging.getLogger("ray._private.worker").addFilter(_news)
    try:
        thread.submit(ray.init, log_to_driver=False, **settings).result()
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS")
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise UserError(f"cannot connect to {where}: {str(error).splitlines()[0]}") from None


def _block_hangups() -> None:
    """For this thread and the processes that it starts, Ray's own: a terminal that closes is the driver's to hear of.

    Else all of them would be gone at once, and nobody left to save the checkpoint that the driver asks for.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def _news(record: logging.LogRecord) -> bool:
    """Whether a warning of Ray's says more than that it sets no handler of SIGTERM."""
    return "SIGTERM handler" not in record.getMessage()


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
    os.environ.setdefault(_START_TIMEOUT, str(config.start_timeout_s))
    # A notice that a node will be taken away counts in seconds: clouds give 30 to 120 of them.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")


def start_timeout_s(config: ClusterConfig) -> float:
    """How long Ray Train waits for room for a worker group, in this process."""
    return float(os.environ.get(_START_TIMEOUT, config.start_timeout_s))


def wanted_cpus(config: ClusterConfig, loaders: int) -> float:
    """CPUs of a worker: as set, else one for itself and one for each of its loader processes."""
    return config.cpus_per_worker or 1.0 + loaders


def request(config: ClusterConfig, loaders: int = 0, environment: Mapping[str, str] = os.environ) -> Resources:
    """Resources per worker, checked against what the connected cluster could ever give.

    Args:
        config: what is asked.
        loaders: decoding processes per worker, which count where `cpus_per_worker` is not set.
        environment: may state what an autoscaler can bring.

    Raises:
        UserError: the cluster is too small; the message says what is asked and what is there.
    """
    growing = groups(environment)
    use_gpu = config.device == "cuda" or (config.device == "auto" and _most("GPU", growing) > 0)
    if config.accelerator and not use_gpu:
        raise UserError(f"cluster.accelerator={config.accelerator} is a type of GPU: it needs cluster.device=cuda")
    asked = Resources(
        config.workers, wanted_cpus(config, loaders), 1 if use_gpu else 0, config.workers_min, config.accelerator
    )
    if not config.cpus_per_worker:
        asked = _within(asked, growing)
    if _room(asked, growing) < asked.min_workers:
        trouble = _too_small(config, asked, growing)
        if growing or not autoscaler_runs():
            raise UserError(trouble)
        say(
            f"warning: {trouble}. An autoscaler runs, whose limits are not known ({VARIABLE} states them): the run"
            " waits for nodes",
            error=True,
        )
    return asked


def _within(asked: Resources, growing: list[Group]) -> Resources:
    """Fewer CPUs for loaders where the cluster has no worker's place with as many; at least one."""
    for cpus in range(int(asked.cpus), 0, -1):
        fewer = replace(asked, cpus=float(cpus))
        if _room(fewer, growing) >= asked.workers:
            if cpus < asked.cpus:
                say(
                    f"cluster.cpus_per_worker: {cpus} for each of {asked.workers} workers, where {asked.cpus:g} (itself"
                    " and data.workers) are wanted; the cluster has no more"
                )
            return fewer
    return asked


def _too_small(config: ClusterConfig, asked: Resources, growing: list[Group]) -> str:
    """What is asked and what is there."""
    key = "cluster.workers_min" if config.workers_min else "cluster.workers"
    least, grown = asked.min_workers, f" or can grow to ({VARIABLE})" if growing else ""
    gpus = int(_most("GPU", growing))
    if asked.gpus and gpus < least:
        instead = f"set {key}={gpus or 1}{'' if gpus else ' and cluster.device=cpu'}, or add nodes"
        return f"{key}={least} needs {least} GPUs, the cluster has{grown} {gpus}: {instead}"
    if asked.accelerator and _room(replace(asked, accelerator=""), growing) >= least:
        types = ", ".join(sorted(_types(growing))) or "of no type that Ray knows"
        return (
            f"{key}={least} needs {least} GPUs of cluster.accelerator={asked.accelerator}, the cluster has{grown} room"
            f" for {_room(asked, growing)} such workers; its GPUs are {types}"
        )
    return (
        f"{key}={least} with cluster.cpus_per_worker={asked.cpus:g} needs {least * asked.cpus:g} CPUs; the cluster has"
        f"{grown} {_most('CPU', growing):g} and room for {_room(asked, growing)} such workers. Ask for fewer workers or"
        " CPUs, or add nodes"
    )


def _most(name: str, growing: list[Group]) -> float:
    """The most of a resource that there is or will be: groups name all nodes that can come, living ones too."""
    coming = sum(group.count * group.resources.get(name, 0.0) for group in growing)
    return max(float(ray.cluster_resources().get(name, 0)), coming)


def _room(asked: Resources, growing: list[Group]) -> int:
    """How many workers fit on the living nodes, or on all that can come."""
    here = sum(_workers_that_fit(node["Resources"], asked) for node in _nodes())
    return max(here, sum(group.count * _workers_that_fit(_typed(group, asked), asked) for group in growing))


def _typed(group: Group, asked: Resources) -> dict[str, float]:
    """A node of the group; where the group does not say of which type its GPUs are, they may be of any."""
    known = any(name.startswith(_TYPE) for name in group.resources)
    return dict(group.resources) if known else {f"{_TYPE}{asked.accelerator}": 1.0, **group.resources}


def _types(growing: list[Group]) -> set[str]:
    names = [name for node in _nodes() for name in node["Resources"]] + [n for g in growing for n in g.resources]
    return {name.removeprefix(_TYPE) for name in names if name.startswith(_TYPE)}


def room_now(asked: Resources) -> int:
    """How many such workers the living nodes hold when nothing else runs there."""
    return sum(_workers_that_fit(node["Resources"], asked) for node in _nodes())


def room_beside(asked: Resources, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the cluster could ever hold all workers and one task like a worker."""
    if fits_beside([dict(node["Resources"]) for node in _nodes()], asked):
        return True
    return _room(asked, groups(environment)) > asked.workers


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


def fitting_nodes(resources: Resources) -> list[dict[str, Any]]:
    """Nodes, in Ray's words, that have room for a worker when nothing else runs there."""
    return [node for node in _nodes() if _workers_that_fit(node["Resources"], resources)]


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _workers_that_fit(node: dict[str, float], asked: Resources) -> int:
    fits = [int(node.get(name, 0) / amount) for name, amount in asked.bundle.items() if amount]
    return min(fits) if fits else asked.workers
