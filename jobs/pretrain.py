"""Pre-trains an iTPN or Fast-iTPN by masked feature modeling on Ray Train, and resumes when run again."""

from __future__ import annotations

import sys
from pathlib import Path

# A submitted job runs this file by path from a copy of the repository; its rooms are imported from there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.config.tree import PretrainConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training
from orchestrator.train.optimizer import derived_lines

FIRST_RUN = str(Path(__file__).resolve().parent / "recipes" / "first_run.yaml")

if __name__ == "__main__":
    sys.exit(run_job(PretrainConfig, __doc__, FIRST_RUN, run_training, resolve, notes=derived_lines))
