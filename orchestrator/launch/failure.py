"""Failures of a worker group: which rank failed first, and how long to wait before the next try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 120.0


class ControllerGoneError(Exception):
    """Ray Train's controller, which watches the workers, is gone.

    Args:
        error: how Ray says it.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            "Ray Train's controller, which runs on the driver's node and watches the workers, is gone: killed, out of"
            f" memory, or the cluster does not answer ({type(error).__name__})\n{error}"
        )


@dataclass(frozen=True)
class Complaint:
    """A rank's own words about its failure."""

    rank: int
    host: str
    text: str


def first_failure(errors: Mapping[int, str], complaints: Sequence[Complaint]) -> str:
    """The rank that failed first, in its own words where it had any.

    A failing rank complains before its connections close, so whoever fails because of it complains later. A rank that
    failed without a complaint was killed, and that comes before all complaints of others about it.

    Args:
        errors: what Ray knows, by rank; may name fewer ranks than have failed.
        complaints: in the order in which they came.
    """
    heard = {complaint.rank for complaint in complaints}
    silent = sorted(set(errors) - heard)
    if silent:
        more = f" (and ranks {', '.join(map(str, silent[1:]))})" if len(silent) > 1 else ""
        return (
            f"rank {silent[0]}{more}: its process ended without a word, killed or out of memory, or its host is gone: "
            f"{last_line(errors[silent[0]])}"
        )
    if complaints:
        first = complaints[0]
        return f"rank {first.rank} on {first.host}: {first.text}"
    return ""


def root_cause(error: BaseException | None) -> str:
    """The lowest failing rank's own words, or what else Ray gives as the reason."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(failures.items())
        return f"rank {rank}: {last_line(str(first)) or type(first).__name__}"
    return last_line(str(error)) or type(error).__name__


def last_line(text: str) -> str:
    """The last line of a traceback, which is the error itself."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def backoff_seconds(idle_failures: int) -> float:
    """Pause before the next group: none after a failure that came after progress, then 5 s, 10 s, … 120 s.

    Args:
        idle_failures: failures in a row that came before any step beyond those that were done already.
    """
    return 0.0 if idle_failures < 1 else min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (idle_failures - 1))
