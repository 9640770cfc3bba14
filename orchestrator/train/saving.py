"""When to save, and what happens while storage fails: training goes on and the save is tried again, within limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from itpn_core.errors import UserError
from orchestrator.checkpoint.config import CheckpointConfig
from orchestrator.checkpoint.pieces import Piece
from orchestrator.checkpoint.runlog import FencedError
from orchestrator.checkpoint.store import CheckpointError, CheckpointStore, Snapshot
from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.tree import JobConfig
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.folder import StorageError
from orchestrator.data.manifest import Manifest
from orchestrator.train.context import RunContext

Take = Callable[[], tuple[Snapshot, Callable[[], None]]]
"""Copies the state to the host; with it comes what must be on storage before that checkpoint counts."""


def load_agreed(store: CheckpointStore, run: RunContext, wanted: Mapping[str, Piece]) -> Snapshot | None:
    """The newest whole checkpoint by rank 0's judgement, loaded on every rank; None for a fresh run.

    Each rank judging for itself could start from another step when a read fails in one place only. Before rank 0 looks,
    the groups before this one lose the right to commit: none of them can add a newer checkpoint afterwards.

    What goes wrong on one rank is raised on all of them: the others would wait for it in a collective call.

    Raises:
        CheckpointError: a rank cannot read what rank 0 could, or it belongs to another model.
        FencedError: the driver that started this group does not own the run any more.
        StorageError: storage does not answer.
    """
    snapshot = _together(run, lambda: _newest(store, run, wanted) if run.rank == 0 else None)
    if run.world == 1:
        return snapshot
    chosen = follow_leader(snapshot.step if snapshot else -1)
    return _together(run, lambda: snapshot if run.rank == 0 or chosen < 0 else store.load(chosen, wanted))


def _newest(store: CheckpointStore, run: RunContext, wanted: Mapping[str, Piece]) -> Snapshot | None:
    store.writer.begin()
    snapshot = store.load_newest(wanted)
    for line in store.passed_over:
        run.note(f"warning: {line}")
    if snapshot is not None:
        store.last_requested = store.last_committed = snapshot.step
    return snapshot


def _together(run: RunContext, call: Callable[[], Snapshot | None]) -> Snapshot | None:
    """What the call gives on this rank; when it fails on any, the first failure by rank on all. Collective."""
    found: Snapshot | None = None
    failure: CheckpointError | FencedError | StorageError | None = None
    try:
        found = call()
    except (CheckpointError, FencedError, StorageError) as error:
        failure = error
    failures = [failure] * run.world
    if run.world > 1:
        dist.all_gather_object(failures, failure)
    for rank, other in enumerate(failures):
        if other is not None:
            raise type(other)(f"rank {rank}: {other}" if rank else str(other)) from failure
    return found


def follow_leader(number: int) -> int:
    """Rank 0's number, on every rank. Collective."""
    # On the host where the group can: `broadcast_object_list` finds the device that fits the group.
    chosen = [int(number)]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def fingerprints(config: JobConfig, manifest: Manifest, run: RunContext) -> dict[str, str]:
    """What made a checkpoint: hashes of the settings that decide results, of the data and of the source code."""
    return {
        "config": fingerprint(result_fields(config, manifest.fingerprint)),
        "data": manifest.fingerprint,
        "code": run.facts.get("source.sha256", ""),
    }


def changed_since(snapshot: Snapshot, now: dict[str, str], precision: str) -> list[str]:
    """A line for everything that is no longer what the checkpoint was made with."""
    before = snapshot.state.get(PRECISION, precision)
    formats = [
        f"the checkpoint of step {snapshot.step} was computed in {before}, this group's hosts compute in {precision}"
        " (train.precision=auto): set train.precision to keep one format"
    ]
    return (formats if before != precision else []) + [
        f"the checkpoint of step {snapshot.step} was made with other {what} ({was[:12]}, now {now.get(name, '')[:12]})"
        for name, what in (("config", "settings"), ("data", "data"), ("code", "source code"))
        if (was := snapshot.made_by.get(name, "")) and was != now.get(name, "")
    ]


AGAIN, DONE, GONE = range(3)
PRECISION = "precision"
"""In a checkpoint's state: the format of the group that wrote it."""


class Saver:
    """Rank 0's decisions about checkpoints; knows nothing of what is in them.

    Where every rank writes a part, all ranks have one and call `save` and `settle` together; rank 0 decides.

    Args:
        config: triggers, retries and limits.
        store: writes in the background.
        note: tells a person.
        clock: seconds; monotonic.
        agree: turns a rank's number into that of the rank that decides.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        store: CheckpointStore,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        agree: Callable[[int], int] = int,
    ) -> None:
        self._agree = agree
        self._config = config
        self._store = store
        self._note = note
        self._clock = clock
        self._requested_at = self._committed_at = clock()
        self._told = 0
        self._missed = False
        self.blocked_seconds: list[float] = []
        """How long each save held up the training thread."""

    def due(self, step: int) -> bool:
        """Whether to save now, in mid-epoch: by step, by time, or because the last save failed or found no room."""
        self._watch()
        since = self._clock() - self._requested_at
        every = self._config.every_steps
        by_step = every > 0 and step // every > max(0, self._store.last_requested) // every
        by_time = self._config.every_minutes > 0 and since > 60 * self._config.every_minutes
        again = self._store.failure is not None and since > self._config.retry_s
        wanted = by_step or by_time or again or self._missed
        # A save that waits for the one before would hold up the training; it stays due until it finds its turn.
        self._missed = wanted and self._store.busy
        return wanted and not self._missed

    def save(self, step: int, take: Take, *, wait_s: float = 0.0) -> None:
        """Copies the state and hands it to the background; does nothing while an earlier save is being written.

        Args:
            step: position of the state.
            take: copies the state.
            wait_s: how long to wait for an earlier save.
        """
        began = time.perf_counter()
        if wait_s > 0:
            self._store.wait(wait_s)
        if not self._agree(self._wanted(step)):
            return
        self._store.wait()  # the buffers of the copy must be free; the deciding rank's are
        self._missed = False
        self._requested_at = self._clock()
        self._store.save(*take())
        self.blocked_seconds.append(time.perf_counter() - began)

    def _wanted(self, step: int) -> bool:
        if self._store.last_requested == step and self._store.failure is None:
            return False  # it is there, or being written
        if self._store.busy:
            self._missed = True
            return False
        return True

    def ended(self) -> UserError | None:
        """Why the run must end: another driver has it, or no save has succeeded for longer than allowed."""
        self._watch()
        if self._store.writer.lost is not None:
            return self._store.writer.lost
        limit = self._config.max_age_s
        age = self._clock() - self._committed_at
        hangs = self._store.busy and self._clock() - self._requested_at > limit
        if not hangs and (self._store.failure is None or age <= limit):
            return None
        return StorageGoneError(self._gone(age, f"checkpoint.max_age_s={self._config.max_age_s:g}"))

    def metrics(self) -> dict[str, float]:
        """Numbers of the saves so far; empty before the first."""
        failing = self._store.failure is not None
        found = {"checkpoint/failed": float(self._store.failures), "checkpoint/failing": float(failing)}
        if self.blocked_seconds:
            found["checkpoint/blocked_seconds"] = self.blocked_seconds[-1]
        if self._store.last_save is not None:
            found["checkpoint/bytes"] = float(self._store.last_save.bytes)
            found["checkpoint/write_seconds"] = self._store.last_save.seconds
        return found

    def settle(self, step: int, take: Take, *, stopping: bool) -> None:
        """Brings the state of `step` onto storage, however often that takes, within the limits.

        Args:
            step: position of the state.
            take: copies the state.
            stopping: a stop request has less time than the end of a run.

        Raises:
            StorageGoneError: storage did not take it in time.
            FencedError: another driver has the run.
        """
        key = "stop_deadline_s" if stopping else "max_age_s"
        limit = float(getattr(self._config, key))
        began = self._clock()
        while True:
            self.save(step, take, wait_s=max(0.0, limit - (self._clock() - began)))
            done = self._store.wait(max(0.0, limit - (self._clock() - began)))
            self._watch()
            committed = done and self._store.last_committed == step
            lost = self._store.writer.lost
            left = limit - (self._clock() - began)
            verdict = self._agree(DONE if committed else AGAIN if left > 0 and lost is None else GONE)
            if verdict == DONE:
                return
            if lost is not None:
                raise lost
            if verdict == GONE:
                raise StorageGoneError(self._gone(self._clock() - self._committed_at, f"checkpoint.{key}={limit:g}"))
            time.sleep(max(0.0, min(self._config.retry_s, left)))

    def _watch(self) -> None:
        """Notices what the background has come to since the last look."""
        if not self._store.busy and self._store.failure is None and self._store.last_committed >= 0:
            self._committed_at = max(self._committed_at, self._requested_at)
        if self._store.failures > self._told and self._store.failure is not None:
            self._told = self._store.failures
            self._note(
                f"warning: a checkpoint was not saved ({self._store.failure}); training goes on, "
                f"next try in {self._config.retry_s:g} s"
            )

    def _gone(self, age: float, limit: str) -> str:
        return (
            f"no checkpoint could be committed for {age:.0f} s, longer than {limit} allows "
            f"({self._store.failures} saves failed; the last: {self._store.failure or 'it is still being written'}). "
            "The last committed checkpoint is intact: repair the storage and type the same command again"
        )
