"""Does the pre-trained pyramid help a dense task? Three arms at equal steps, several seeds, mean and spread.

    python tests/benchmarks/dense_transfer.py --checkpoint RUN_FOLDER

Segments scenes of real product photographs (see product_scenes.py): products of the training images in the training and
tuning scenes, products of the held-out images in the test scenes. Arms: the checkpoint's backbone and pyramid, its
backbone with a new pyramid, all weights new. Head, order, crops and steps are the same; each arm gets the learning rate
that was best for it on the tuning scenes (one seed that is not used again).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from product_scenes import NAMES, write_scenes

from orchestrator.checkpoint.source import open_source
from orchestrator.data import fashion
from orchestrator.dense.backbone import open_backbone
from orchestrator.dense.config import BackboneConfig, DenseTrainConfig, HeadConfig, MaskDataConfig, SegmentConfig
from orchestrator.dense.masks import read_masks
from orchestrator.dense.segmentation import Segmentation
from orchestrator.dense.train import evaluate, train
from orchestrator.train.config import OptimizerConfig

ARMS = ("pre-trained backbone and pyramid", "pre-trained backbone, new pyramid", "all new")
TUNING_SEED = 1000


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/itpn-orchestrator/fashion-mnist").expanduser())
    parser.add_argument("--train-scenes", type=int, default=200)
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--head", default="fpn", choices=("fpn", "upernet"))
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


def prepare(asked, folder: Path):
    """Writes the scenes; returns the checked splits by name."""
    photographs = fashion.load(asked.cache, print)
    sets = (("train", "train", asked.train_scenes, 1), ("tune", "train", asked.test_scenes // 2, 2),
            ("test", "val", asked.test_scenes, 3))  # fmt: skip
    for name, source, count, seed in sets:
        write_scenes(folder / name, *photographs[source], count, seed)
    return {name: read_masks(f"{folder}/{name}/images", f"{folder}/{name}/masks", len(NAMES)) for name, *_ in sets}


def run(asked, arm: str, rate: float, seed: int, splits, held_out: str):
    """Trains one arm; returns its metrics on the held-out scenes."""
    pyramid = "new" if arm == ARMS[1] else "auto"
    backbone = BackboneConfig(checkpoint="" if arm == ARMS[2] else asked.checkpoint, pyramid=pyramid)
    source = open_source(asked.checkpoint, pyramid=True)
    backbone = replace(backbone, pyramid_dim=source.pyramid_dim)
    optimizer = OptimizerConfig(lr=rate, betas=(0.9, 0.999), clip_grad_norm=1.0)
    length = DenseTrainConfig(
        steps=asked.steps, batch=asked.batch, seed=seed, device="cpu", log_every=asked.steps, optimizer=optimizer
    )
    config = SegmentConfig(
        model=source.model,
        backbone=backbone,
        data=MaskDataConfig(classes=NAMES, crop=96, scale=(0.8, 1.2)),
        head=HeadConfig(kind=asked.head, channels=asked.channels),
        train=length,
    )
    torch.manual_seed(seed)
    task = Segmentation(config, open_backbone(backbone, source.model), splits["train"], splits[held_out])
    begun = time.perf_counter()
    before = evaluate(task, torch.device("cpu"))["miou"]
    metrics = train(task, length, lambda _: None, lambda *_: None)
    print(
        f"{arm}: rate {rate:g}, seed {seed}, {held_out}: mIoU {100 * before:.1f} % -> {100 * metrics['miou']:.1f} %"
        f" ({time.perf_counter() - begun:.0f} s)",
        flush=True,
    )
    return metrics


def main() -> None:
    """Tunes, trains, prints the table."""
    asked = arguments()
    results = []
    with tempfile.TemporaryDirectory(prefix="scenes-") as scratch:
        splits = prepare(asked, Path(scratch))
        for arm in ARMS:
            tuned = {rate: run(asked, arm, rate, TUNING_SEED, splits, "tune")["miou"] for rate in asked.rates}
            rate = max(tuned, key=tuned.__getitem__)
            found = [run(asked, arm, rate, seed, splits, "test") for seed in range(asked.seeds)]
            results.append({"arm": arm, "rate": rate, "tuning": tuned, "runs": found})
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{asked.steps} steps of {asked.batch} scenes, {asked.train_scenes} training scenes, {asked.head} head")
    print("| arm | learning rate | mIoU, mean | spread (lowest to highest) | pixel accuracy |")
    print("|---|---|---|---|---|")
    for entry in results:
        scores = [100 * found["miou"] for found in entry["runs"]]
        right = statistics.mean(100 * found["pixel_accuracy"] for found in entry["runs"])
        print(
            f"| {entry['arm']} | {entry['rate']:g} | {statistics.mean(scores):.1f} % | {min(scores):.1f} to "
            f"{max(scores):.1f} % | {right:.1f} % |"
        )


if __name__ == "__main__":
    main()
