"""Examines whether a recipe, this machine, storage and tracking are fit for a run: a table and an exit code.

    python jobs/doctor.py --recipe jobs/recipes/first_run.yaml

A few steps are run at 1, 2 and 4 ranks and across a kill. Exit code: 0 all well, 1 a check failed, 2 settings
that cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.doctor import doctor
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve

FIRST_RUN = str(Path(__file__).resolve().parent / "recipes" / "first_run.yaml")

if __name__ == "__main__":
    sys.exit(run_job(DoctorConfig, __doc__, FIRST_RUN, doctor, resolve))
