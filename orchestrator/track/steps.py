"""A set of step numbers in little memory: which (metric, step) a server already holds."""

from __future__ import annotations

from bisect import bisect_right


class StepSet:
    """Steps of one metric. Regular spacing (every 10th step) costs a few numbers however long the run is.

    Increasing steps extend runs (first, stride, last); steps that come out of order go to a plain set.
    """

    def __init__(self) -> None:
        self._first: list[int] = []
        self._last: list[int] = []
        self._stride: list[int] = []
        self._strays: set[int] = set()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, step: int) -> bool:
        at = bisect_right(self._first, step) - 1
        if at >= 0 and step <= self._last[at] and (step - self._first[at]) % self._stride[at] == 0:
            return True
        return step in self._strays

    def add(self, step: int) -> bool:
        """Put a step in; False when it was there already."""
        if step in self:
            return False
        self._size += 1
        if self._first and step < self._last[-1]:
            self._strays.add(step)
        elif self._first and self._extends(step):
            self._stride[-1] = step - self._last[-1]
            self._last[-1] = step
        else:
            self._first.append(step)
            self._last.append(step)
            self._stride.append(1)
        return True

    def _extends(self, step: int) -> bool:
        """Whether a later step continues the last run: any step follows a single one, then the stride is fixed."""
        single = self._first[-1] == self._last[-1]
        return single or step - self._last[-1] == self._stride[-1]

    @property
    def pieces(self) -> int:
        """Stored runs and strays, the measure of memory."""
        return len(self._first) + len(self._strays)
