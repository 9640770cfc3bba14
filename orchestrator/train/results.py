"""Evaluations beside the training, as far as storage knows them: which were asked for, and what came of each.

Results lie on run storage, so that no restart loses one and none is done twice:

evaluations/step-00000468.json    state, metrics, right answers, error, seconds
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from orchestrator.data.folder import Folder

DONE, FAILED, LOST, SKIPPED = "done", "failed", "lost", "skipped"
_PLACE = "evaluations"
_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class Request:
    """A committed checkpoint that is to be measured."""

    step: int
    best: float | None = None
    """Value of `checkpoint.best_metric` that a better one must beat; None = there is none yet."""


@dataclass(frozen=True)
class Result:
    """What came of an evaluation."""

    step: int
    state: str
    """done, failed (it raised, or took too long), lost (its process was gone each time) or skipped (a newer came)."""
    metrics: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Which samples were answered rightly (indices), by what was measured."""
    error: str = ""
    """Why there are no metrics: a sentence, or a whole traceback."""
    seconds: float = 0.0
    """From its start to its end; of a lost one, of all tries."""


def keep(folder: Folder, result: Result) -> None:
    """Writes a result to run storage; the first one for a step stays."""
    folder.put(_key(result.step), json.dumps(asdict(result)).encode(), only_if_absent=True)


def kept(folder: Folder, steps: Collection[int] | None = None, without: Collection[int] = ()) -> list[Result]:
    """Results on run storage by step: those of `steps`, or all; never those of `without`."""
    found = (_NAME.fullmatch(name) for name in folder.names(_PLACE))
    held = {int(match[1]) for match in found if match}
    wanted = held & set(held if steps is None else steps) - set(without)
    return [Result(**json.loads(folder.get(_key(step)))) for step in sorted(wanted)]


def describe(results: Sequence[Result]) -> str:
    """What all of them came to, in one line for the end table; "" when there were none."""
    if not results:
        return ""
    spent = sum(result.seconds for result in results)
    parts = [f"{sum(result.state == DONE for result in results)} of {len(results)} done in {spent:.0f} s of their own"]
    for state in (FAILED, LOST, SKIPPED):
        steps = [str(result.step) for result in results if result.state == state]
        if steps:
            parts.append(f"{state}: step {', '.join(steps)}")
    return "; ".join(parts) + " (no part of the time of all ranks)"


def _key(step: int) -> str:
    return f"{_PLACE}/step-{step:08d}.json"
