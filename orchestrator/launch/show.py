"""What a person sees while a run goes on and when it ends."""

from __future__ import annotations

import sys
from typing import TextIO

from orchestrator.launch.board import News, Progress
from orchestrator.launch.say import write


class ProgressLine:
    """One line that is rewritten in place on a terminal; elsewhere only notes and one line per epoch are printed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._width = 0
        self._epoch = -1

    def __call__(self, news: News) -> None:
        """Shows the latest progress; called about twice a second."""
        for note in news.notes:
            self._print(note)
        if news.progress is None:
            return
        progress = news.progress
        text = describe(progress)
        if self._live:
            write(self._out, "\r" + text.ljust(self._width))
            self._width = len(text)
        elif progress.stage == "training" and progress.epoch != self._epoch:
            self._epoch = progress.epoch
            self._print(text)

    def close(self) -> None:
        """Ends the live line."""
        if self._live and self._width:
            write(self._out, "\n")

    def _print(self, text: str) -> None:
        if self._live and self._width:
            write(self._out, "\r" + " " * self._width + "\r")
            self._width = 0
        write(self._out, f"{text}\n")


def describe(progress: Progress) -> str:
    """The progress line, for example `training  step 120/468  epoch 1  loss -0.512  310 images/s  4 min left`."""
    if progress.stage != "training" or not progress.total:
        return progress.stage
    left = ""
    if progress.images_per_second > 0 and progress.seconds_per_step > 0:
        left = f"  {duration((progress.total - progress.step) * progress.seconds_per_step)} left"
    return (
        f"training  step {progress.step}/{progress.total}  epoch {progress.epoch + 1}  loss {progress.loss:.4f}"
        f"  {progress.images_per_second:.0f} images/s{left}"
    )


def duration(seconds: float) -> str:
    """A time span as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns between rules."""
    width = max(len(name) for name, _ in rows)
    body = [f"  {name.ljust(width)}   {value}" for name, value in rows]
    rule = "-" * min(100, max(len(line) for line in body) + 2)
    return "\n".join([rule, *body, rule])
