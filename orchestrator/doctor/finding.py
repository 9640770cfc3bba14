"""What a check found, and the table of all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    state: str
    """ "ok", "warning" or "FAILED"."""
    detail: str


def table(findings: list[Finding]) -> str:
    """Aligned lines, failures marked so that they are seen."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{f.state.ljust(7)}  {f.what.ljust(width)}  {f.detail}" for f in findings)
