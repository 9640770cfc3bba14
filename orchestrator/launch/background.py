"""A thread that lasts as long as a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_PATIENCE_S = 15.0


@contextlib.contextmanager
def background(name: str, body: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs a function on a thread until the block ends; waits for its last round, but not for ever.

    Args:
        name: of the thread.
        body: returns soon after the event that it is given is set.
    """
    done = threading.Event()
    thread = threading.Thread(target=body, args=(done,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=_PATIENCE_S)
