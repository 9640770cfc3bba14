"""Requests to stop that come as signals: Ctrl-C, SIGTERM, `ray job stop`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType


class StopRequest(BaseException):
    """Somebody asked to stop while nothing has to be saved; no `except Exception` on the way may swallow it."""


class Stops:
    """First signal: save what is to be saved and end. Second: end at once. A context for the main thread.

    What the first does depends on what goes on: within `interrupting` it raises `StopRequest` there and then, else it
    calls `tell`, and the next `interrupting` block raises.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Name of the signal; "" until one came."""
        self.tell: Callable[[str], None] = lambda _: None
        """Hands the reason to the training; must not wait."""
        self._interrupt = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> Stops:
        self._old = self.listen()
        return self

    def listen(self) -> dict[int, object]:
        """Puts our handlers in their place (again after `ray.init`, which has its own); returns what was there."""
        return {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block without anything to save.

        Raises:
            StopRequest: a signal comes, or came before.
        """
        self._interrupt = True
        try:
            if self.reason:
                raise StopRequest(self.reason)
            yield
        finally:
            self._interrupt = False

    def _handle(self, number: int, _frame: object) -> None:
        if self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._interrupt:
            print(f"\n{self.reason}: stopping", file=sys.stderr, flush=True)
            raise StopRequest(self.reason)
        text = "saving a checkpoint and stopping; once more to stop at once"
        print(f"\n{self.reason}: {text}", file=sys.stderr, flush=True)
        self.tell(self.reason)
