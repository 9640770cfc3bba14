"""What is left of a hang: one file per rank on run storage, and a sentence about the rank that the others waited for.

hangs/<incident>/rank-00000.txt    first line JSON (step, phase, samples, last collective), then all Python stacks
hangs/<incident>/TOLD              a person was told
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from orchestrator.data.folder import Folder
from orchestrator.train.outside import Place, stacks_of, state_of

TOLD = "TOLD"
_LOOP = "train/loop.py"


@dataclass(frozen=True)
class Report:
    """Where one rank stood when it had got nowhere for too long."""

    rank: int
    world: int
    phase: str
    """Class of the ledger in which it hangs."""
    quiet_s: float
    limit_s: float
    step: int
    """Last finished step, -1 before the first."""
    samples: list[int]
    """Ids of the samples it took up last."""
    collective: str
    """The last call that waits for other ranks."""
    collectives: int
    """How many such calls it had entered."""
    thread: int
    """Identifier of the training thread in `stacks`."""
    stacks: str
    seen_by: int = -1
    """Rank that wrote this in the place of one that could not; -1 = it wrote itself."""
    state: str = ""
    """What its process was doing then, where another rank wrote."""

    @property
    def training_stack(self) -> str:
        """The part of `stacks` that belongs to the training thread, innermost call first."""
        for part in self.stacks.split("\n\n"):
            if f"0x{self.thread:016x}" in part.splitlines()[0] or (self.seen_by >= 0 and _LOOP in part):
                return part
        return self.stacks

    def describe(self) -> str:
        """One line."""
        if self.seen_by >= 0:
            return (
                f"rank {self.rank} of {self.world} is the slowest and wrote nothing: its process {self.state}. Others "
                f"wait for it. What rank {self.seen_by} saw of it from outside:"
            )
        return (
            f"rank {self.rank} of {self.world}: {self.quiet_s:g} s in {self.phase} (limit {self.limit_s:g} s) after "
            f"step {self.step}; last collective call: {self.collective} (number {self.collectives})"
        )


def write(folder: Folder, incident: str, report: Report) -> None:
    """Leaves a rank's report on storage."""
    head = {name: value for name, value in asdict(report).items() if name != "stacks"}
    folder.put(f"hangs/{incident}/rank-{report.rank:05d}.txt", f"{json.dumps(head)}\n{report.stacks}".encode())


def read(folder: Folder, incident: str) -> list[Report]:
    """All reports of an incident, by rank."""
    reports = []
    for name in folder.names(f"hangs/{incident}"):
        if name.startswith("rank-"):
            head, _, stacks = folder.get(f"hangs/{incident}/{name}").decode().partition("\n")
            reports.append(Report(**json.loads(head), stacks=stacks))
    return reports


def written(folder: Folder, incident: str) -> set[int]:
    """Ranks of which there is a report."""
    names = folder.names(f"hangs/{incident}")
    return {int(name.removeprefix("rank-").removesuffix(".txt")) for name in names if name.startswith("rank-")}


def wait_for_all(folder: Folder, incident: str, world: int, deadline: float) -> None:
    """Waits until there is a report of every rank, or the time (monotonic) has come."""
    while len(written(folder, incident)) < world and time.monotonic() < deadline:
        time.sleep(0.2)


def write_for_silent(folder: Folder, incident: str, places: Sequence[Place], rank: int) -> None:
    """Writes for the ranks of this host that have not: the first rank here that could write looks at them.

    Args:
        folder: the run's.
        incident: name of the hang.
        places: of all ranks.
        rank: of this process.
    """
    spoke = written(folder, incident)
    mine = [other for other, place in enumerate(places) if place.host == places[rank].host]
    if min((other for other in mine if other in spoke), default=rank) != rank:
        return
    for other in mine:
        if other not in spoke:
            pid = places[other].pid
            seen = Report(
                rank=other, world=len(places), phase="unknown", quiet_s=0.0, limit_s=0.0, step=-1, samples=[],
                collective="unknown", collectives=-1, thread=0, stacks=stacks_of(pid), seen_by=rank,
                state=f"(pid {pid}) {state_of(pid)}",
            )  # fmt: skip
            write(folder, incident, seen)


def tell(folder: Folder, incident: str) -> str:
    """What a person should know: the slowest rank, where it stands, and where the rest is."""
    reports = read(folder, incident)
    if not reports:
        return f"a rank hung; it left nothing in {folder.uri}/hangs/{incident}"
    silent = sorted(set(range(reports[0].world)) - {report.rank for report in reports})
    slowest = min(reports, key=lambda report: (report.collectives, report.step, report.rank))
    lines = ["the group hangs and is started again from the last checkpoint"]
    if silent:
        lines.append(
            f"rank {', '.join(map(str, silent))} of {slowest.world} is the slowest and wrote nothing: its process is "
            "stopped and alone on its host, or its host is gone. Others wait for it:"
        )
    lines += [slowest.describe(), slowest.training_stack, f"(all stacks: {folder.uri}/hangs/{incident}/)"]
    return "\n".join(lines)


def mark_told(folder: Folder, incident: str) -> None:
    """Notes that a person was told of the incident."""
    folder.put(f"hangs/{incident}/{TOLD}", b"")


def untold(folder: Folder) -> list[str]:
    """What should be told of earlier incidents and was not, because rank 0 was the one that hung; marks it as told."""
    texts = []
    for incident in folder.names("hangs"):
        if not folder.exists(f"hangs/{incident}/{TOLD}"):
            texts.append(tell(folder, incident))
            mark_told(folder, incident)
    return texts
