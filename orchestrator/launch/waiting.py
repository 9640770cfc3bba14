"""When the driver ends Ray Train itself: no worker group runs, or one that runs cannot end; and what is said then."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from orchestrator.launch.board import Group
from orchestrator.launch.cluster import Resources, room_now
from orchestrator.launch.show import duration

_SILENT_S = 20.0
"""A group that says nothing for so long is not there to save anything: rank 0 speaks twice a second."""
_REFUSED_S = 20.0
"""Where all ranks refuse, they have ended by then; else one refused alone, and the others wait for it for ever."""
_CLOSING_S = 300.0
"""While rank 0 still closes: its last save and the journal have limits of their own, which are shorter."""
_ASK_S = 5.0


class NoRoomError(Exception):
    """The cluster never had room for the workers."""


class Waiting:
    """Judges, as often as asked, whether to go on waiting for a worker group.

    Ray Train listens to nothing while it waits for room, and an elastic group waits without an end of its own. A group
    of which one rank has ended waits in a collective call, for as long as that call's own limit.

    Args:
        board: the noticeboard, which hears of groups.
        asked: resources of the workers.
        limit_s: how long to go on without a word of any group.
    """

    def __init__(self, board: Any, asked: Resources, limit_s: float) -> None:
        self._board, self._asked, self._limit_s = board, asked, limit_s
        self.ended = False
        """Whether the waiting was ended from here."""
        self.refused = False
        """Whether that was because a rank had refused to go on, in words that are on the board."""
        self._words = ""

    def over(self, *, stop: bool) -> bool:
        """Whether to end Ray Train now: one rank refused, or no group runs that could save, or none for too long."""
        if self.ended:
            return False
        try:
            group: Group = ray.get(self._board.group.remote(), timeout=_ASK_S)
        except RayError:
            return False  # the board's host is this one: the next look tells
        if group.refused_s > (_CLOSING_S if group.closing else _REFUSED_S):
            self.ended = self.refused = True
        elif stop and (not group.running or group.silent_s > _SILENT_S):
            self.ended = True
        elif group.silent_s > self._limit_s:
            self.ended = True
            self._words = self._no_room(duration(group.silent_s))
        return self.ended

    def verdict(self, error: Exception | None) -> Exception:
        """The error to tell: a start that found no room is said in words of the cluster."""
        failure = getattr(error, "controller_failure", None)
        if self._words or isinstance(failure, WorkerGroupStartupTimeoutError):
            return NoRoomError(self._words or self._no_room(duration(self._limit_s)))
        return error or NoRoomError("the worker group was ended")

    def _no_room(self, waited: str) -> str:
        room = "an unknown number"
        with contextlib.suppress(RayError):
            room = str(room_now(self._asked))
        return (
            f"no worker group ran for {waited}: {self._asked.min_workers} workers with {self._asked} each are needed,"
            f" and the nodes that are there hold {room}. Look at the autoscaler (`ray status`), ask for less, or add"
            " nodes"
        )


def end_controller() -> None:
    """Ends this job's Ray Train controller, and with it the waiting; its placement group goes with it."""
    job = ray.get_runtime_context().get_job_id()
    core = ray._private.worker.global_worker.core_worker
    for number, actor in ray._private.state.actors().items():
        if actor["JobID"] == job and actor["ActorClassName"] == "TrainController" and actor["State"] != "DEAD":
            core.kill_actor(ray.ActorID.from_hex(number), True)
