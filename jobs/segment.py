"""Trains and evaluates a segmenter (UPerNet or FPN head) on the pre-trained pyramid, on images and PNG masks.

    python jobs/segment.py backbone.checkpoint=RUN_FOLDER data.train_images=FOLDER ...

Needed: data.train_images, data.val_images, data.classes; data.train_masks and data.val_masks where masks lie apart.

Exit code: 0, or 2 for settings or data that cannot be used.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.dense.config import SegmentConfig
from orchestrator.dense.job import segment
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import object_store, resolve_run

if __name__ == "__main__":
    sys.exit(run_job(SegmentConfig, __doc__ or "", "", lambda c, _: segment(c, object_store()), resolve_run))
