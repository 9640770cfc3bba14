"""Which checkpoints stay: a pure rule."""

from __future__ import annotations

from collections.abc import Sequence


def kept(steps: Sequence[int], last: int, every_steps: int, best: int) -> set[int]:
    """The steps whose checkpoints stay.

    Args:
        steps: steps of all committed checkpoints.
        last: how many of the newest stay, at least one.
        every_steps: of every range of so many steps, the first checkpoint stays for good; 0 = none does.
        best: step of the best checkpoint; -1 = there is none.
    """
    ordered = sorted(steps)
    stay = set(ordered[-last:])
    if every_steps:
        # The first at or after each multiple: saves come at window ends, not always at the very step.
        milestones: dict[int, int] = {}
        for step in ordered:
            milestones.setdefault(step // every_steps, step)
        stay |= {step for part, step in milestones.items() if part > 0}
    return stay | ({best} & set(ordered))
