"""Requests to stop that come as signals: Ctrl-C, SIGTERM, `ray job stop`, a terminal that closes (SIGHUP)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from orchestrator.launch.say import drop_dead, say, terminals

_AGAIN_S = 0.02
"""After so long a signal is sent again that came where it must not be raised."""


class StopRequest(BaseException):
    """Somebody asked to stop while nothing has to be saved; no `except Exception` on the way may swallow it."""


class Stops:
    """First signal: save what is to be saved and end. Second: end at once. A context for the main thread.

    A terminal that closes may be told of twice, by the kernel and by the shell, so SIGHUP is never the second. Under
    `nohup` it is ignored here too.

    What the first does depends on what goes on: within `interrupting` it raises `StopRequest` there and then, else it
    calls `tell`, and the next `interrupting` block raises.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Name of the signal; "" until one came."""
        self.tell: Callable[[str], None] = lambda _: None
        """Hands the reason to the training; must not wait."""
        self._terminals = terminals()
        self._interrupt = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> Stops:
        self._old = self.listen()
        return self

    def listen(self) -> dict[int, object]:
        """Puts our handlers in their place (again after `ray.init`, which wraps them); returns what was there."""
        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        return {number: signal.signal(number, self._handle) for number in heard}

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
        if number == signal.SIGHUP:
            drop_dead(self._terminals)
            if self.reason:
                return
        if self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        if self._interrupt:
            say(f"\n{self.reason}: stopping", error=True)
            raise StopRequest(self.reason)
        text = "saving a checkpoint and stopping; once more to stop at once"
        say(f"\n{self.reason}: {text}", error=True)
        self.tell(self.reason)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A block in which SIGTERM does what Ctrl-C does at that moment; begun again after `ray.init`, which wraps it.

    So does a terminal that closes, once (see `Stops`).
    """
    streams = terminals()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    def hang_up(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        drop_dead(streams)
        interrupt(number, frame)

    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        old[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # it has hung up, and may say so again
                signal.signal(number, handler)


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
