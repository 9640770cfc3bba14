"""Trials as every search knows them: what was asked, how it ended, and which settings may not come again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.sweep.space import Setting, Space

RUNNING, FINISHED, PRUNED, FAILED, INFEASIBLE = "running", "finished", "pruned", "failed", "infeasible"
STATES = (RUNNING, FINISHED, PRUNED, FAILED, INFEASIBLE)
_FALLBACKS = 200


@dataclass(frozen=True)
class Trial:
    """One trial as the journal keeps it.

    Attributes:
        number: 0-based, in the order of asking.
        setting: what is tried.
        state: one of `STATES`; "infeasible" ran out of memory, "failed" is excluded from everything.
        values: measured values by name: the objectives and whatever limits name; may be empty unless finished.
        memo: the sampler's own notes, JSON values; needed to rebuild it exactly.
    """

    number: int
    setting: Setting
    state: str = RUNNING
    values: Mapping[str, float] = field(default_factory=dict)
    memo: Mapping[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """What the driver needs of a search."""

    def ask(self) -> Trial | None:
        """A new running trial, or None when every setting of the space is known."""

    def tell(self, number: int, state: str, values: Mapping[str, float] | None = None) -> None:
        """How a running trial ended."""


class Known:
    """Trials so far: numbers, states and settings that may not come again."""

    def __init__(self, space: Space, seed: int, trials: Sequence[Trial]) -> None:
        self.space, self.seed = space, seed
        self.next = max((trial.number for trial in trials), default=-1) + 1
        self.settings = {trial.setting for trial in trials}
        self.running = {trial.number for trial in trials if trial.state == RUNNING}
        self._least = 0

    def check_end(self, number: int, state: str) -> None:
        """Takes a running trial out; it ended as `state`."""
        if number not in self.running:
            raise ValueError(f"trial {number} is not running, so it cannot end as {state}")
        if state not in STATES or state == RUNNING:
            raise ValueError(f"a trial ends as one of {', '.join(STATES[1:])}, not {state!r}")
        self.running.remove(number)

    def start(self, setting: Setting, memo: Mapping[str, Any]) -> Trial:
        """A new running trial of a setting."""
        trial = Trial(self.next, setting, memo=memo)
        self.running.add(trial.number)
        self.settings.add(setting)
        self.next += 1
        return trial

    def random(self) -> Setting | None:
        """An unseen random setting; None when there is none left."""
        for attempt in range(_FALLBACKS):
            setting = self.space.draw(self.seed, self.next * _FALLBACKS + attempt)
            if setting not in self.settings:
                return setting
        # luck has run out: either few are left, or none
        return None if self.space.continuous else self.first(1)

    def first(self, levels: int) -> Setting | None:
        """The first unseen setting of the grid."""
        return next((setting for setting in self.space.grid(levels) if setting not in self.settings), None)

    def exhausted(self) -> bool:
        """Whether a countable space has been tried in full."""
        if self.space.continuous:
            return False
        if len(self.settings) >= self._least:
            # Counted only as far as needed: a space of thousands of settings takes seconds.
            self._least = self.space.size(2 * len(self.settings) + 1) or 0
        return len(self.settings) >= self._least
