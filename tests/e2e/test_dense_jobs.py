"""Detection, segmentation and export as a person runs them: from one checkpoint, each a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.dense.scenes import write_coco, write_masks
from tests.unit.export.test_export import write_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
SHORT = ["train.steps=3", "train.batch=2", "train.device=cpu"]


def job(home, name, *words):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *words],
        cwd=ROOT, env={**clean, "ITPN_HOME": str(home)}, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


def test_one_checkpoint_becomes_a_detector_a_segmenter_and_files(tmp_path):
    write_run(tmp_path / "run")
    checkpoint = f"backbone.checkpoint={tmp_path}/run"
    folder, annotations = write_coco(tmp_path / "coco")[:2]
    images, masks = write_masks(tmp_path / "masks")

    places = [f"data.{split}_images={folder}" for split in ("train", "val")]
    places += [f"data.{split}_annotations={annotations}" for split in ("train", "val")]
    small = ["detector.min_size=[64]", "detector.max_size=96", "detector.box_batch=16"]
    detected = job(tmp_path, "detect", checkpoint, *places, *small, *SHORT, "run.name=boxes")
    assert detected.returncode == 0, detected.stdout + detected.stderr
    assert "pyramid: the checkpoint's" in detected.stdout
    assert "box_ap" in json.loads((tmp_path / "runs" / "boxes" / "metrics.json").read_text())

    places = [f"data.{split}_images={images}" for split in ("train", "val")]
    places += [f"data.{split}_masks={masks}" for split in ("train", "val")]
    classes = "data.classes=[ground,green,blue]"
    segmented = job(tmp_path, "segment", checkpoint, *places, classes, *SHORT, "head.channels=32", "run.name=pixels")
    assert segmented.returncode == 0, segmented.stdout + segmented.stderr
    assert "miou" in json.loads((tmp_path / "runs" / "pixels" / "metrics.json").read_text())

    exported = job(tmp_path, "export", f"source={tmp_path}/run", f"dest={tmp_path}/out", "output=maps")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert exported.stdout.count("equal: ") == 5

    wrong = job(tmp_path, "segment", checkpoint, *places, "data.classes=[a,b]", *SHORT)
    assert wrong.returncode == 2
    assert "holds class 2; data.classes names 2" in wrong.stderr
    assert "Traceback" not in wrong.stderr
