"""Requests to stop that come as signals: Ctrl-C, SIGTERM, `ray job stop`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

_AGAIN_S = 0.02
"""After so long a signal is sent again that came where it must not be raised."""


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
        """Puts our handlers in their place (again after `ray.init`, which wraps them); returns what was there."""
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interrupt and not self.reason and _logs(frame):
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        if self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._interrupt:
            print(f"\n{self.reason}: stopping", file=sys.stderr, flush=True)
            raise StopRequest(self.reason)
        text = "saving a checkpoint and stopping; once more to stop at once"
        print(f"\n{self.reason}: {text}", file=sys.stderr, flush=True)
        self.tell(self.reason)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A block in which SIGTERM does what Ctrl-C does at that moment; begun again after `ray.init`, which wraps it."""
    old = signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _logs(frame: FrameType | None) -> bool:
    """Whether the interrupted code is inside `logging`.

    It takes a lock of the whole process there without `finally`: raised into it, a stop would leave the lock taken, and
    every thread that logs afterwards would wait for ever.
    """
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).split(".")[0] == "logging":
            return True
        frame = frame.f_back
    return False
