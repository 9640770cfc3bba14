"""Trains and evaluates a detector (Mask R-CNN, Faster R-CNN) on the pre-trained pyramid, on COCO-format data.

    python jobs/detect.py backbone.checkpoint=RUN_FOLDER data.train_images=FOLDER ...

Needed: data.train_images, data.train_annotations, data.val_images, data.val_annotations.

Exit code: 0, or 2 for settings or data that cannot be used.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.dense.config import DetectConfig
from orchestrator.dense.job import detect
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import object_store, resolve_run

if __name__ == "__main__":
    sys.exit(run_job(DetectConfig, __doc__ or "", "", lambda c, _: detect(c, object_store()), resolve_run))
