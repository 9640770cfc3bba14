"""A progress line that a person can read; silent when nobody watches a terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts towards `total` and redraws one line at most five times a second."""

    def __init__(self, title: str, total: int, unit: str = "images") -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._drawn, self._began = 0, 0.0, time.monotonic()
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._draw()
            sys.stderr.write("\n")

    def advance(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        if self._live and time.monotonic() - self._drawn > 0.2:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        rate = self._done / max(self._drawn - self._began, 1e-3)
        left = (self._total - self._done) / rate if rate else 0.0
        share = self._done / self._total if self._total else 1.0
        text = (
            f"{self._title}  {self._done:,} of {self._total:,} {self._unit} ({share:.0%})  "
            f"{rate:,.0f}/s  {left:.0f} s left"
        )
        sys.stderr.write(f"\r{text:<100}")
        sys.stderr.flush()
