"""What a run trained on, put together from the records of `recorded.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Group:
    """One start of the worker group."""

    entered: float
    world: int
    first: int
    """Step of the checkpoint it began from."""
    steps_per_epoch: int
    restored: float
    hosts: set[str] = field(default_factory=set)
    parts: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    """Sample ids by step and rank."""
    first_step_at: float = 0.0

    def whole(self) -> dict[int, list[int]]:
        """Sample ids in slot order of every step that all ranks have done."""
        done = {step: ranks for step, ranks in self.parts.items() if len(ranks) == self.world}
        return {step: [i for rank in sorted(ranks) for i in ranks[rank]] for step, ranks in done.items()}


def groups(records: list[dict[str, Any]]) -> list[Group]:
    """Worker groups in order of time; records of ranks that have not done a step yet are left out."""
    found: dict[str, Group] = {}
    for record in sorted((r for r in records if r["steps"]), key=lambda r: r["entered"]):
        group = found.setdefault(
            record["group"],
            Group(record["entered"], record["world"], record["from"], record["steps_per_epoch"], 0.0),
        )
        # The last rank to be ready is the one that the others waited for.
        group.entered = max(group.entered, record["entered"])
        group.restored = max(group.restored, record["restored"])
        group.first_step_at = max(group.first_step_at, record["steps"][0]["at"])
        group.hosts.add(record["host"])
        for step in record["steps"]:
            group.parts.setdefault(step["step"], {})[record["rank"]] = step["ids"]
    return list(found.values())


def check_lineage(found: list[Group], total: int, batch: int) -> int:
    """Asserts that the steps that count make up every epoch once; returns how many steps were done again.

    A step counts unless a later group began before it.
    """
    lineage: dict[int, list[int]] = {}
    dropped: dict[int, list[int]] = {}
    for group in found:
        dropped |= {step: ids for step, ids in lineage.items() if step >= group.first}
        lineage = {step: ids for step, ids in lineage.items() if step < group.first} | group.whole()
    assert sorted(lineage) == list(range(total)), f"steps were lost: {sorted(set(range(total)) - set(lineage))}"
    for step, ids in dropped.items():
        assert lineage[step] == ids, f"step {step} was done again with other samples"
    per_epoch = found[0].steps_per_epoch
    for begin in range(0, total, per_epoch):
        seen = [i for step in range(begin, min(begin + per_epoch, total)) for i in lineage[step]]
        assert len(seen) == batch * min(per_epoch, total - begin)
        assert len(set(seen)) == len(seen), f"a sample came twice in the epoch of step {begin}"
    return len(dropped)
