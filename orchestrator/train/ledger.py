"""The goodput ledger: what every second of every rank went to.

Each class has measured spans of its own and none is the remainder: what no span covers is shown as `unaccounted`. Spans
nest; an inner span stops the clock of the outer one, so no second counts twice. Seconds add up over ranks: the window's
all-reduce carries them, and rank 0 holds the rank-seconds of the whole run.

Over a restart, rank 0 leaves its totals beside the checkpoints once per window (`ledger.json`). The next attempt finds
there what was spent after the checkpoint it resumes from: compute and data wait of those steps were lost work. The time
from that file to the new attempt's engine is counted as restart. At the first start and after a stop that is the time
from the birth of a process to its engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CLASSES = ("compute", "data", "checkpoint", "compile", "evaluation", "restart", "lost")
LABELS = {"data": "data wait", "restart": "start and restart", "lost": "lost work"}
REDONE = ("compute", "data")
KEY = "ledger.json"


class Stopwatch:
    """One rank's seconds by class since it was made; used by one thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun = self._since = clock()
        self._open: list[str] = []
        self._taken = self._begun
        self.seconds = dict.fromkeys(CLASSES, 0.0)
        self.changes = 0
        """Spans opened and closed so far: another thread sees by it that this one lives."""

    @property
    def current(self) -> str:
        """Class of the innermost open span, "" outside of all."""
        opened = self._open
        return opened[-1] if opened else ""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`; an enclosing span rests meanwhile."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Opens a span; `leave` closes it. For places where a block does not fit, such as compiler hooks."""
        self._settle()
        self._open = [*self._open, name]  # replaced, not changed: `current` is read by another thread
        self.changes += 1

    def leave(self) -> None:
        """Closes the innermost span."""
        self._settle()
        self._open = self._open[:-1]
        self.changes += 1

    def take(self) -> dict[str, float]:
        """Seconds by class, and "elapsed" of all, since the last call."""
        self._settle()
        taken, self.seconds = self.seconds, dict.fromkeys(CLASSES, 0.0)
        elapsed, self._taken = self._since - self._taken, self._since
        return {**taken, "elapsed": elapsed}

    def _settle(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass
class Ledger:
    """Rank-seconds of the whole run so far, over all ranks and attempts."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    elapsed: float = 0.0
    """Rank-seconds that should be accounted for: of all ranks from their start, and of the pauses between attempts."""
    restarts: int = 0
    redone_steps: int = 0

    def add(self, taken: dict[str, float]) -> None:
        """Adds what `Stopwatch.take` gave, summed over ranks."""
        for name in CLASSES:
            self.seconds[name] += taken[name]
        self.elapsed += taken["elapsed"]

    @property
    def unaccounted(self) -> float:
        """Rank-seconds that no span covers."""
        return self.elapsed - sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of all rank-seconds that went into steps that count."""
        return self.seconds["compute"] / self.elapsed if self.elapsed > 0 else 0.0

    def fractions(self) -> dict[str, float]:
        """Share of every class, "unaccounted" among them; adds up to 1."""
        whole = self.elapsed or 1.0
        return {**{name: s / whole for name, s in self.seconds.items()}, "unaccounted": self.unaccounted / whole}

    def describe(self) -> str:
        """One line for the end table: `compute 91.2 %, data wait 3.1 %, ...`, without classes that never happened."""
        parts = [f"{LABELS.get(n, n)} {100 * f:.1f} %" for n, f in self.fractions().items() if f or n == "unaccounted"]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return {
            "seconds": dict(self.seconds),
            "elapsed": self.elapsed,
            "restarts": self.restarts,
            "redone_steps": self.redone_steps,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Ledger:
        """What `to_json` gave."""
        return Ledger(dict(value["seconds"]), value["elapsed"], value["restarts"], value["redone_steps"])


@dataclass(frozen=True)
class Trace:
    """What rank 0 leaves behind once per window, in case this attempt ends without a word."""

    ledger: Ledger
    step: int
    at: float
    """Unix time."""
    world: int
    ended: bool = False
    """The attempt ended by itself (finished or stopped): what follows is no restart."""

    def dumps(self) -> bytes:
        """As bytes for storage."""
        fields = {"step": self.step, "at": self.at, "world": self.world, "ended": self.ended}
        return json.dumps({**fields, "ledger": self.ledger.to_json()}).encode()

    @staticmethod
    def loads(data: bytes) -> Trace:
        """What `dumps` gave."""
        value = json.loads(data)
        ledger = Ledger.from_json(value.pop("ledger"))
        return Trace(ledger=ledger, **value)


def resumed(saved: Ledger, step: int, trace: Trace | None, now: float, late_s: float = 0.0, world: int = 1) -> Ledger:
    """The ledger with which an attempt goes on.

    Args:
        saved: the ledger in the checkpoint that is resumed from (an empty one for a start from nothing).
        step: the step of that checkpoint.
        trace: what the attempt before left; None when there was none.
        now: Unix time at which this attempt's engine began.
        late_s: for how long rank 0's process had been there by then.
        world: number of ranks now.
    """
    ledger = Ledger.from_json((trace.ledger if trace else saved).to_json())
    if trace and trace.step > step:
        for name in REDONE:
            redone = max(0.0, ledger.seconds[name] - saved.seconds[name])
            ledger.seconds[name] -= redone
            ledger.seconds["lost"] += redone
        ledger.redone_steps += trace.step - step
    if trace and not trace.ended:
        pause = max(0.0, now - trace.at) * trace.world
        ledger.restarts += 1
    else:
        pause = max(0.0, late_s) * world
    ledger.seconds["restart"] += pause
    ledger.elapsed += pause
    return ledger
