"""Searches settings of token reduction for the best trades of accuracy and speed of a checkpoint, and resumes."""

from __future__ import annotations

import sys
from pathlib import Path

# A submitted job runs this file by path from a copy of the repository; its rooms are imported from there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.config.tree import SweepJobConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.sweep.job import sweep, sweep_settings

RECIPE = str(Path(__file__).resolve().parent / "recipes" / "sweep_token_reduction.yaml")
SHORT = {"--checkpoint": "evaluate.checkpoint", "--trials": "sweep.trials"}

if __name__ == "__main__":
    sys.exit(run_job(SweepJobConfig, __doc__, RECIPE, sweep, resolve, short=SHORT, base=sweep_settings))
