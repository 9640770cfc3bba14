"""`jobs/doctor.py`: every check, a table, and an exit code."""

from __future__ import annotations

from orchestrator.doctor import agreement, surroundings
from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.finding import Finding, table
from orchestrator.launch.check import check

NEEDED = ("data", "teacher")
"""Without these no step can be taken."""


def doctor(config: DoctorConfig, recipe: str) -> int:
    """Examines surroundings, then the recipe; returns 0, or 1 when a check failed."""
    print(f"examining recipe {recipe}", flush=True)
    findings: list[Finding] = list(surroundings.examine(config))
    missing = [finding.what for finding in findings if finding.what in NEEDED and finding.state == "FAILED"]
    if missing:
        findings.append(Finding("steps", "FAILED", f"none could be taken: see {' and '.join(missing)}"))
    else:
        check(config)  # settings that do not go together end here, with exit code 2
        findings += agreement.examine(config)
    print(table(findings))
    failed = sum(finding.state == "FAILED" for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return 1 if failed else 0
