"""Fine-tunes a classifier on Ray Train, from a pre-trained checkpoint or from scratch, and resumes when run again.

python jobs/finetune.py --init ~/itpn/runs/NAME data.source=~/itpn/data/cifar10
"""

from __future__ import annotations

import sys
from pathlib import Path

# A submitted job runs this file by path from a copy of the repository; its rooms are imported from there.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.config.tree import FinetuneConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training
from orchestrator.train.optimizer import derived_lines

RECIPE = str(Path(__file__).resolve().parent / "recipes" / "finetune_first_run.yaml")
SHORT = {"--init": "init.checkpoint", "--size": "model.img_size"}

if __name__ == "__main__":
    sys.exit(run_job(FinetuneConfig, __doc__, RECIPE, run_training, resolve, short=SHORT, notes=derived_lines))
