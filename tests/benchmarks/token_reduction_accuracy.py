"""Trains a small backbone here, then measures what every way of dropping tokens costs it.

    python tests/benchmarks/token_reduction_accuracy.py --data FOLDER [--steps 600] [--backbone FILE]

FOLDER holds WebDataset tars `train-*.tar` and `test-*.tar` of small images (`key.jpg`, `key.cls`). The backbone is a
Fast-iTPN of patch size 4 at 32 px, pre-trained without labels by the first run's objective: the features of an
ImageNet teacher, at all tokens (or loaded from --backbone, or saved to it when the file does not exist). Prints Part B
of the token-reduction benchmark and the comparison of rules.
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

from itpn_core.benchmark.accuracy import accuracy_table, compare_rules
from itpn_core.benchmark.timing import machine
from itpn_core.benchmark.token_reduction import PLAIN, quality, quality_table
from itpn_core.models import Backbone, ModelConfig, build_backbone
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.tasks import build_task
from itpn_core.random import stream_keys, uniform
from itpn_core.reduction import TokenGathering, TokenMigration

OBJECTIVE = ObjectiveConfig(loss_tokens="all", target_norm="channel", stem_gradient_scale=1.0, pyramid_dim=64)
CONFIG = ModelConfig(embed_dim=192, depths=(1, 1, 6), patch_size=4, img_size=32)
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (OBJECTIVE.mean, OBJECTIVE.std))


def read(folder: Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` images uint8 [N, 3, H, W] of a split, over all its shards in turn, and their classes [N]."""
    images, labels = [], []
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"--data {folder}: no {split}-*.tar there")
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {m.name: m for m in tar.getmembers()}
            keys = [name.rsplit(".", 1)[0] for name in members if name.endswith(".jpg")]
            for key in keys[: -(-count // len(shards))]:
                picture = Image.open(io.BytesIO(tar.extractfile(members[f"{key}.jpg"]).read())).convert("RGB")
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                labels.append(int(tar.extractfile(members[f"{key}.cls"]).read()))
    return torch.stack(images)[:count], torch.tensor(labels)[:count]


def pretrain(images: torch.Tensor, steps: int, batch: int, seed: int) -> Backbone:
    """The first run's objective for a number of steps, with flips and crops of +-4 pixels."""
    torch.manual_seed(seed)
    task = build_task(CONFIG, OBJECTIVE).train()
    task.fit_target_statistics(chunk.float() / 255 for chunk in images[:1024].split(64))
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        keys = stream_keys(seed, step, torch.arange(batch), "sample")
        draws = uniform(keys, 4)
        chosen = images[(draws[:, 0] * len(images)).long()].float() / 255
        chosen = torch.where(draws[:, 1, None, None, None] < 0.5, chosen, chosen.flip(3))
        padded = torch.nn.functional.pad(chosen, (4, 4, 4, 4), mode="reflect")
        corner = (draws[:, 2:] * 9).long().tolist()
        view = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, corner, strict=True)])
        loss = task(view, task.targets(view), keys).loss_B.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        schedule.step()
        task.ema_update((step + 1) / steps)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - start:.0f} s", flush=True)
    model = build_backbone(CONFIG)
    model.load_state_dict(task.student.export_backbone_state())
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, help="safetensors of CONFIG: read, or written when it does not exist")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=20000, help="training images")
    parser.add_argument("--bank", type=int, default=3000, help="labelled images")
    parser.add_argument("--queries", type=int, default=2000, help="held-out images")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.625, 0.75])
    options = parser.parse_args()
    train, labels = read(options.data, "train", max(options.images, options.bank))
    held, held_labels = read(options.data, "test", options.queries)
    if options.backbone and options.backbone.exists():
        model = build_backbone(CONFIG).eval()
        model.load_state_dict(load_file(options.backbone))
    else:
        model = pretrain(train[: options.images], options.steps, options.batch, seed=0)
        if options.backbone:
            save_file(model.state_dict(), options.backbone)
    pick = torch.arange(len(train))[:: max(1, len(train) // options.bank)][: options.bank]
    bank = ((train[pick] / 255 - MEAN) / STD, labels[pick])
    queries = ((held / 255 - MEAN) / STD, held_labels)
    print(
        f"\nbank {len(pick)}, held out {len(held)} images of 32 px, patch 4, grid 8x8. {machine(torch.device('cpu'))}"
    )
    settings = {PLAIN: (TokenMigration(), TokenGathering())}
    for keep in options.keeps:
        settings[f"migration keep {keep:g} before {options.layer}"] = (
            TokenMigration((options.layer,), (keep,)),
            TokenGathering(),
        )
    settings["gathering window 4, 2 tokens"] = (TokenMigration(), TokenGathering(4, 2))
    settings["gathering window 4, 2 tokens, layers 0-1 global"] = (
        TokenMigration(),
        TokenGathering(4, 2, global_layers=(0, 1)),
    )
    print("\nPart B\n\n" + quality_table(quality(model, settings, bank, queries)))
    rows = compare_rules(model, bank, queries, layer=options.layer, keeps=tuple(options.keeps))
    print("\nRules at equal token counts\n\n" + accuracy_table(rows))


if __name__ == "__main__":
    main()
