"""Words for a person, which no trouble of a terminal, a pipe or a disk may turn into an error of the job."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import TextIO


def say(text: str, *, error: bool = False) -> None:
    """Prints a line on standard output, or on standard error."""
    write(sys.stderr if error else sys.stdout, f"{text}\n")


def write(out: TextIO, text: str) -> None:
    """Writes at once; a reader that has gone (`| head`), a dead terminal or a full disk ends nothing."""
    # RuntimeError: a signal's handler prints while the code below it does.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        out.write(text)
        out.flush()


def terminals() -> list[TextIO]:
    """Which of the standard streams are terminals now."""
    return [stream for stream in (sys.stdout, sys.stderr) if _is_terminal(stream)]


def drop_dead(streams: Iterable[TextIO]) -> None:
    """Sends to nowhere what goes to terminals that have hung up: whatever prints there would fail."""
    for stream in streams:
        if not _is_terminal(stream):
            _drop(stream)


def settle() -> None:
    """Drops what could not be printed; else the interpreter tries again at its end, and ends with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False


def _drop(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
