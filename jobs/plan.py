"""Forecasts a pre-training before it starts, from a few real steps on this machine; afterwards compares.

python jobs/plan.py --recipe jobs/recipes/fast_itpn_base.yaml plan.devices=8 train.peak_tflops=989
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.plan import plan

FIRST_RUN = str(Path(__file__).resolve().parent / "recipes" / "first_run.yaml")

if __name__ == "__main__":
    sys.exit(run_job(PlanConfig, __doc__, FIRST_RUN, plan, resolve))
