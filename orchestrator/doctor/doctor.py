"""`jobs/doctor.py`: every check, a table, and an exit code."""

from __future__ import annotations

from dataclasses import replace

from itpn_core.errors import UserError
from orchestrator.doctor import agreement, surroundings
from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.finding import Finding, table
from orchestrator.launch.check import check

NEEDED = ("data", "teacher")
"""Without these no step can be taken."""


def doctor(config: DoctorConfig, recipe: str) -> int:
    """Examines surroundings, then the recipe; returns 0, or 1 when a check failed, settings against each other too."""
    print(f"examining recipe {recipe}", flush=True)
    findings: list[Finding] = list(surroundings.examine(config))
    missing = [finding.what for finding in findings if finding.what in NEEDED and finding.state == "FAILED"]
    if missing:
        findings.append(Finding("steps", "FAILED", f"none could be taken: see {' and '.join(missing)}"))
    elif trouble := _settings(config):
        findings.append(Finding("settings", "FAILED", trouble))
    else:
        findings += agreement.examine(config)
    print(table(findings))
    failed = sum(finding.state == "FAILED" for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return 1 if failed else 0


def _settings(config: DoctorConfig) -> str:
    """What a start of the run would refuse, "" for nothing; tracking is a finding of its own already."""
    try:
        check(replace(config, track=replace(config.track, required=False, follow=False)))
    except UserError as error:
        return " ".join(str(error).split())
    return ""
