"""Threads that last: as long as a block, and whatever a round of theirs raises."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
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


class Rounds:
    """Rounds of a thread that nobody would miss at once: an error ends its round only, and is logged once per kind.

    Args:
        what: that goes on, for the log.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._told: set[type[Exception]] = set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A round."""
        try:
            yield
        except Exception as error:
            if type(error) not in self._told:
                self._told.add(type(error))
                log.exception("%s goes on after an error", self._what)
