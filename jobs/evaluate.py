"""Measures a checkpoint under settings of token reduction, beside itself unreduced: k-NN, linear probe, speed, memory.

python jobs/evaluate.py --checkpoint ~/itpn/runs/NAME --size 224 model.migration.layers=[2] model.migration.keep=[0.5]
"""

from __future__ import annotations

import sys
from pathlib import Path

# A submitted job runs this file by path from a copy of the repository; its rooms are imported from there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.config.tree import EvaluateConfig
from orchestrator.evaluate.choice import checkpoint_settings
from orchestrator.evaluate.job import evaluate
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve

SHORT = {
    "--checkpoint": "evaluate.checkpoint",
    "--knn": "evaluate.knn",
    "--linear": "evaluate.linear",
    "--size": "data.image_size",
    "--json": "evaluate.json",
}

if __name__ == "__main__":
    sys.exit(run_job(EvaluateConfig, __doc__, "", evaluate, resolve, short=SHORT, base=checkpoint_settings))
