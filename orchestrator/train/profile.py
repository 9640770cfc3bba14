"""A torch profiler trace of a few steps, kept with the run (open it in Perfetto or chrome://tracing)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from itpn_core.errors import ConfigError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced."""

    steps: str = field(
        default="", metadata={"help": "first..last step to trace on rank 0, such as 10..15; empty = none"}
    )

    def __post_init__(self) -> None:
        self.range()

    def range(self) -> tuple[int, int] | None:
        """First and last step, or None.

        Raises:
            ConfigError: the text is no range.
        """
        if not self.steps:
            return None
        found = _RANGE.fullmatch(self.steps)
        if not found or int(found[1]) > int(found[2]):
            raise ConfigError("profile.steps", self.steps, "it must be first..last, such as 10..15")
        return int(found[1]), int(found[2])


class Profiler:
    """Traces the steps of one rank that are asked for.

    Args:
        config: which steps.
        directory: run directory; the trace goes to `profile/` in it.
        keep: takes the finished file.
    """

    def __init__(self, config: ProfileConfig, directory: Path, keep: Callable[[Path], None]) -> None:
        self._range = config.range()
        self._directory = directory
        self._keep = keep
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Called before each step; a run that resumes inside the range traces what is left of it."""
        if self._range and not self._running and self._range[0] <= step <= self._range[1]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._first = step
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> None:
        """Called after each step with the same number."""
        if self._range and self._running and step >= self._range[1]:
            self._finish(step)

    def close(self) -> None:
        """Lets go of a trace that never came to its last step."""
        if self._running:
            self._running.stop()
            self._running = None

    def _finish(self, last: int) -> None:
        running, self._running = self._running, None
        assert running is not None  # noqa: S101 -- `after` saw it
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        running.stop()
        path = self._directory / "profile" / f"steps-{self._first}-{last}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(path))
        self._keep(path)
