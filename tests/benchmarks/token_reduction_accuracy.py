"""Trains small backbones here, then measures what every way of dropping tokens costs them.

    python tests/benchmarks/token_reduction_accuracy.py {train,tune,compare,quality} --data FOLDER --backbones FOLDER

The data folder holds WebDataset tars `train-*.tar` and `test-*.tar` of small images (`key.jpg`, `key.cls`). A backbone
is a Fast-iTPN of patch size 4 at 32 px, pre-trained without labels by the first run's objective: the features of an
ImageNet teacher, at all tokens. It is trained once per seed and kept in the folder of backbones.

Answers of a seed are kept there too, so that seeds can be run one by one and the table is made of all of them.

train    only makes the backbones that are missing; one process per seed may run at a time
tune     our own definitions of migration against each other, on training images that nothing else looks at
compare  migration by its defaults against every baseline at equal measured speed, on the test split
quality  Part B of the token-reduction benchmark: many settings of the first seed's backbone, on the test split
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from itpn_core.benchmark.accuracy import (
    Answers,
    Data,
    accuracy_table,
    answers,
    compare_rules,
    joined,
    schedule,
    variants,
    variants_table,
)
from itpn_core.benchmark.timing import Spread, machine
from itpn_core.benchmark.token_reduction import PLAIN, flops_ratios, measured_ratios, quality, quality_table
from itpn_core.models import Backbone, ModelConfig, build_backbone
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.tasks import build_task
from itpn_core.random import stream_keys, uniform
from itpn_core.reduction import TokenGathering, TokenMigration

OBJECTIVE = ObjectiveConfig(loss_tokens="all", target_norm="channel", stem_gradient_scale=1.0, pyramid_dim=32)
CONFIG = ModelConfig(embed_dim=128, depths=(1, 1, 6), patch_size=4, img_size=32)
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (OBJECTIVE.mean, OBJECTIVE.std))
RATE, BATCH, STATISTICS = 1e-3, 32, 1024


def read(folder: Path, split: str, count: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [count, 3, H, W] and classes [count] of a split; all shards give an equal part of both counts."""
    images, labels = [], []
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"--data {folder}: no {split}-*.tar there")
    first, each = skip // len(shards), -(-count // len(shards))
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {m.name: m for m in tar.getmembers()}
            keys = [name.rsplit(".", 1)[0] for name in members if name.endswith(".jpg")]
            for key in keys[first : first + each]:
                picture = Image.open(io.BytesIO(tar.extractfile(members[f"{key}.jpg"]).read())).convert("RGB")
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                labels.append(int(tar.extractfile(members[f"{key}.cls"]).read()))
    return torch.stack(images)[:count], torch.tensor(labels)[:count]


def view_of(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """One training view per key: a random image, flipped or not, moved by up to 4 pixels."""
    draws = uniform(keys, 4)
    chosen = images[(draws[:, 0] * len(images)).long()].float() / 255
    chosen = torch.where(draws[:, 1, None, None, None] < 0.5, chosen, chosen.flip(3))
    padded = torch.nn.functional.pad(chosen, (4, 4, 4, 4), mode="reflect")
    corner = (draws[:, 2:] * 9).long().tolist()
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, corner, strict=True)])


def pretrain(images: torch.Tensor, steps: int, seed: int) -> Backbone:
    """The first run's objective for a number of steps, in bf16; the seed draws initialisation, views and masks."""
    torch.manual_seed(seed)
    task = build_task(CONFIG, OBJECTIVE).train()
    task.fit_target_statistics(chunk.float() / 255 for chunk in images[:STATISTICS].split(BATCH))
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    start = time.process_time()
    for step in range(steps):
        keys = stream_keys(seed, step, torch.arange(BATCH), "sample")
        view = view_of(images, keys)
        with torch.autocast("cpu", torch.bfloat16):
            loss = task(view, task.targets(view), keys).loss_B.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"seed {seed} step {step} loss {loss.item():.4f} {time.process_time() - start:.0f} s", flush=True)
    model = build_backbone(CONFIG)
    model.load_state_dict(task.student.export_backbone_state())
    return model.eval()


def backbone(options: argparse.Namespace, seed: int) -> Backbone:
    """The backbone of a seed: from its file, or trained now and written there."""
    path = options.backbones / f"backbone-{seed}.safetensors"
    if path.exists():
        model = build_backbone(CONFIG).eval()
        model.load_state_dict(load_file(path))
        return model
    model = pretrain(read(options.data, "train", options.images)[0], options.steps, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model


def data(options: argparse.Namespace, split: str, count: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and their classes."""
    images, labels = read(options.data, split, count, skip)
    return (images / 255 - MEAN) / STD, labels


def answers_of(options: argparse.Namespace, seed: int, bank: Data, queries: Data) -> dict[str, Answers]:
    """The answers of one seed to all settings: from its file, or found now and written there."""
    settings = {
        "tune": lambda: variants(options.layer, options.keeps[0]),
        "compare": lambda: schedule(options.layer, options.keeps, seed),
    }[options.what]()
    asked = repr((settings, options.bank, options.queries, options.steps, options.images))
    path = options.backbones / f"{options.what}-{seed}.pt"
    kept = torch.load(path, weights_only=True) if path.exists() else {}
    if kept.get("asked") != asked:
        model = backbone(options, seed)
        found = answers(model, seed, settings, bank, queries, layer=options.layer, dtype=torch.bfloat16)
        kept = {"asked": asked, "found": {name: dict(vars(got)) for name, got in found.items()}}
        torch.save(kept, path)
    return {name: Answers(**got) for name, got in kept["found"].items()}


def part_b(options: argparse.Namespace, model: Backbone, bank: Data, queries: Data) -> str:
    """Many settings on the first backbone: ratio, cosine, k-NN."""
    off = (TokenMigration(), TokenGathering())
    settings = {PLAIN: off}
    for layer in (1, options.layer, 3):
        for keep in (*options.keeps, 0.875):
            migration = TokenMigration((layer,), (keep,))
            settings[f"migration, keep {keep:g} before layer {layer}"] = (migration, off[1])
    two = TokenMigration((2, 4), (0.625, 0.6))
    settings["migration, keep 0.625 before layer 2 and 0.6 before layer 4"] = (two, off[1])
    for layers in ((), (0, 1), (0, 1, 2, 3)):
        left = f", layers {layers} global" if layers else ""
        settings[f"gathering, window 4, 2 tokens{left}"] = (off[0], TokenGathering(4, 2, global_layers=layers))
    return quality_table(quality(model, settings, bank, queries, dtype=torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tune", "compare", "quality"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbones", type=Path, required=True, help="folder: read, and written where one is missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the pre-training")
    parser.add_argument("--steps", type=int, default=600, help="of the pre-training, 32 images each")
    parser.add_argument("--images", type=int, default=15000, help="training images")
    parser.add_argument("--bank", type=int, default=4000, help="labelled training images; each seed draws half")
    parser.add_argument("--queries", type=int, default=2500, help="images to classify")
    parser.add_argument(
        "--rounds", type=int, default=25, help="timing rounds of compare; 0: equal FLOPs, not equal time"
    )
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.625, 0.75])
    options = parser.parse_args()
    if options.what == "train":
        for seed in options.seeds:
            backbone(options, seed)
        return
    # the default is chosen on training images that neither pre-training nor the bank has seen
    hidden = ("train", options.queries, options.images) if options.what == "tune" else ("test", options.queries)
    bank, queries = data(options, "train", options.bank), data(options, *hidden)
    print(f"\n{options.what}: bank {options.bank}, {options.queries} {hidden[0]} images of 32 px, patch 4, grid 8x8, "
          f"features in bf16, seeds {options.seeds}. {machine(torch.device('cpu'))}\n")  # fmt: skip
    if options.what == "quality":
        print(part_b(options, backbone(options, options.seeds[0]), bank, queries))
        return
    found = joined([answers_of(options, seed, bank, queries) for seed in options.seeds])
    if options.what == "tune":
        print(variants_table(found))
        return
    model = backbone(options, options.seeds[0])
    calls = {PLAIN: (TokenMigration(), TokenGathering())} | schedule(options.layer, options.keeps, 0)
    sample = queries[0][:64]
    if options.rounds:
        speeds = measured_ratios(model, calls, sample, options.rounds)
    else:
        speeds = {name: Spread(ratio, ratio, ratio) for name, ratio in flops_ratios(CONFIG, calls, sample).items()}
    print(accuracy_table(compare_rules(found, speeds, options.keeps)))


if __name__ == "__main__":
    main()
