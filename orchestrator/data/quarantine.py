"""Damaged samples: counted, listed for repair, and tolerated up to a budget."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.data.errors import QuarantineError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """One sample that could not be used.

    Attributes:
        id: sample id.
        shard: path of its tar.
        offset: byte offset of its first member in the tar.
        reason: what was wrong.
    """

    id: int
    shard: str
    offset: int
    reason: str


class Quarantine:
    """The list of holes: ids known from an earlier attempt, and what was found since.

    A hole keeps its position: no other sample moves, so the order stays that of the manifest.
    """

    def __init__(self, budget: int, known: Iterable[int] = ()) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self.known = set(known)
        self.found: list[Damage] = []

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self.known

    def add(self, damage: Damage) -> None:
        """Records a hole.

        Raises:
            QuarantineError: the budget is spent.
        """
        with self._lock:
            if damage.id in self.known:
                return
            self.known.add(damage.id)
            self.found.append(damage)
            count = len(self.known)
        text = f"{damage.shard}, offset {damage.offset} (sample {damage.id}): {damage.reason}"
        if count > self._budget:
            raise QuarantineError(
                f"{text}. {count} damaged sample(s), data.quarantine_budget allows {self._budget}: repair the shard "
                "(jobs/index_shards.py --verify lists the damage) or raise the budget"
            )
        _log.warning("quarantined %s; %d of %d allowed", text, count, self._budget)
