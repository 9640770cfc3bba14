"""A look at a process of this host that cannot speak for itself: stopped, or stuck in the kernel."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LOOK_S = 10.0
"""Longest time that a look takes."""
_STATES = {
    "T": "is stopped (SIGSTOP, or a debugger)",
    "t": "is stopped by a debugger",
    "D": "waits inside the kernel (a disk or a network file system that does not answer)",
    "Z": "has ended",
}


class Place(NamedTuple):
    """Where a process is."""

    host: str
    """Name of the host, and which process numbers count there: containers have their own."""
    pid: int


def here() -> Place:
    """The place of this process."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return Place(f"{socket.gethostname()} {numbers}".strip(), os.getpid())


def state_of(pid: int) -> str:
    """What a process of this host is doing, as a verb phrase."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "is gone"
    return _STATES.get(letter, "runs, but its watchdog does not (some call keeps Python's lock)")


def stacks_of(pid: int) -> str:
    """The Python stacks of another process, read from its memory without asking it; else why that is not possible."""
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return "(no stack: py-spy is not installed here)"
    # A stopped process cannot be paused by the tool, which is its way unless told otherwise.
    command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=False)  # noqa: S603 - a fixed tool
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(no stack: {error})"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        return f"(no stack: py-spy says {reason!r}; looking into other processes takes root or SYS_PTRACE)"
    return done.stdout.strip()
