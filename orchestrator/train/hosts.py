"""The hosts that a run's ranks are on: their shape in words, and the load of each."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orchestrator.config.tree import JobConfig
from orchestrator.data.folder import StorageError
from orchestrator.track.committed import CommittedJournal
from orchestrator.track.config import sqlite_path
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.track.system import SystemSampler
from orchestrator.train.context import RunContext

_log = logging.getLogger(__name__)
_CLOSE_S = 5.0  # longest wait of a host that is done; what MLflow lacks then, the driver ships from run storage


@dataclass(frozen=True)
class Hosts:
    """Where one rank is among the hosts.

    Attributes:
        node: number of this rank's host, in order of first ranks.
        leads: whether this is the first rank on its host.
        shape: all of them in words.
    """

    node: int
    leads: bool
    shape: str


def find_hosts(run: RunContext) -> Hosts:
    """Asks every rank where it is. Collective."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    mine = (socket.gethostname(), device)
    places = [mine]
    if run.world > 1:
        places = [mine] * run.world
        dist.all_gather_object(places, mine)
    return describe(places, run.rank)


def describe(places: Sequence[tuple[str, str]], rank: int) -> Hosts:
    """The shape of a group of ranks.

    Args:
        places: host and device of each rank.
        rank: whose place is asked for.
    """
    names = [host for host, _ in places]
    hosts = list(dict.fromkeys(names))
    counts = [names.count(host) for host in hosts]
    each = f"{counts[0]}" if len(set(counts)) == 1 else "+".join(map(str, counts))
    words = f"{_plural(len(hosts), 'host')}, {_plural(len(places), 'rank')}"
    if len(hosts) > 1:
        words += f" ({each}{' on each' if len(set(counts)) == 1 else ''})"
    devices = ", ".join(sorted({device for _, device in places}))
    return Hosts(hosts.index(names[rank]), names.index(names[rank]) == rank, f"{words}, {devices}")


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class HostLoad:
    """Records the load of a host that rank 0 is not on, as its first rank sees it.

    The records go to a journal of their own on this host and from there to MLflow; what MLflow does not take in time
    reaches it from run storage when the run ends.

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        node: number of this host.
        step: gives the current step.
    """

    def __init__(self, config: JobConfig, run: RunContext, node: int, step: Callable[[], int]) -> None:
        self._journal = CommittedJournal(run.folder, run.directory)
        self._recorder = Recorder(
            config.track,
            run.run_uid,
            run.directory,
            run.attempt,
            name=config.run.name,
            role=f"node{node}",
            creates=False,
            secrets=secret_values(os.environ),
            follow=config.track.follow and sqlite_path(config.track.uri) is None,  # such a file is on another host
        )
        self._sampler = SystemSampler(self._recorder.metrics, step, f"node{node}", config.track.system_every_s)
        self._sampler.start()

    def trouble(self) -> str:
        """As `Recorder.trouble`."""
        return self._recorder.trouble()

    def close(self) -> None:
        """Ends the thread and commits the journal."""
        self._sampler.close()
        segments = self._recorder.close_segment()
        self._recorder.close(_CLOSE_S)
        try:
            self._journal.commit(segments)
        except StorageError as error:
            _log.warning("the load of this host is not in run storage: %s", error)
