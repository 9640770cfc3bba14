"""What the engine asks of whoever runs it: its place in the group, storage, and a line to the driver."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.data.folder import Folder
from orchestrator.train.results import Request, Result

CLOSING = "closing"
"""Stage of a rank 0 that brings what it has onto storage after an error."""
REFUSED = "refused"
"""Stage of a rank 0 that has ended because of an error that a restart would meet again."""
PREEMPTED = "preempted"
"""A stop reason that begins with it is no person's wish: the run goes on elsewhere."""


class RunContext(Protocol):
    """One rank's surroundings. Ray Train provides one; tests run the engine under their own."""

    rank: int
    world: int
    local_world: int
    """Ranks on this host."""
    device: torch.device
    folder: Folder
    """Run folder on shared storage."""
    directory: Path
    """Local directory of the run on this host: journal, figures, exported weights."""
    run_uid: str
    attempt: int
    began_at: float
    """Unix time from which this process was there for the run: imports and such come before the engine."""
    term: int
    """Fencing number of the driver that owns the run; 0 when none does."""
    facts: dict[str, str]
    """What the launcher knows about code, recipe and cluster; becomes tags."""

    def progress(
        self, stage: str, *, step: int = 0, total: int = 0, epoch: int = 0, loss: float = 0.0, speed: float = 0.0,
        seconds_per_step: float = 0.0,
    ) -> None:  # fmt: skip
        """Shows a person where the run is; returns at once. Called on rank 0."""

    def measured(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Shows the numbers of the `steps` steps up to `step` to whoever watches; returns at once. Called on rank 0."""

    def note(self, text: str) -> None:
        """A line worth keeping in the driver's output. Called on rank 0."""

    def stop_reason(self) -> str:
        """Why the run should save and end, "" to go on. Only rank 0's answer counts; returns at once."""

    def report(self, metrics: dict[str, float], checkpoint_step: int) -> None:
        """Hands numbers and the newest committed checkpoint to the launcher. Collective: every rank calls it."""

    def ask_evaluation(self, request: Request) -> None:
        """Lets a committed checkpoint be measured beside the training; returns at once. Called on rank 0."""

    def evaluated(self) -> list[Result]:
        """What came of the evaluations asked for, since the last call; returns at once. Called on rank 0."""


class Silent:
    """A `RunContext` that tells nobody anything: for probes and checks, which leave nothing behind.

    Args:
        directory: storage and local directory at once.
        rank: of this process.
        world: number of processes.
        device: to compute on; None = the CPU.
    """

    run_uid = "0" * 32
    attempt = 1
    term = 0

    def __init__(self, directory: Path, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world, self.local_world = rank, world, world
        self.device = device or torch.device("cpu")
        self.directory = directory
        self.began_at = time.time()
        self.folder = Folder(str(directory))
        self.facts: dict[str, str] = {}

    def progress(self, stage: str, **_: Any) -> None:
        """Not shown."""

    def measured(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""

    def stop_reason(self) -> str:
        """Never."""
        return ""

    def report(self, metrics: dict[str, float], checkpoint_step: int) -> None:
        """Not kept."""

    def ask_evaluation(self, request: Request) -> None:
        """Nobody measures it."""

    def evaluated(self) -> list[Result]:
        """Nothing was measured."""
        return []
