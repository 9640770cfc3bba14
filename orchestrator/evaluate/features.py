"""Features of many images on many ranks, gathered where they are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Split
from orchestrator.data.views import EvalView

Extract = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] on the device -> features [B, D]."""


@torch.no_grad()
def collect(
    extract: Extract,
    data: DataConfig,
    split: Split,
    view: EvalView,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Features and labels of the view's samples, in the view's order. Collective: every rank calls it.

    Args:
        extract: what to compute.
        data: how to read.
        split: what to read.
        view: which samples, and at which size.
        batch: images per forward pass and rank.
        rank: of this process.
        world: number of ranks.
        device: where to compute.

    Returns:
        float32 [N, D] and int64 [N] on the CPU, the same on every rank.
    """
    features, labels, ids = [], [], []
    with open_loader(
        data,
        split,
        seed=0,
        epoch=0,
        first_batch=0,
        global_batch=batch * world,
        rank=rank,
        world=world,
        view=view,
    ) as batches:
        for item in batches:
            if len(item.ids):
                features.append(extract(item.images.to(device, non_blocking=True)).float().cpu())
                labels.append(item.labels)
                ids.append(item.ids)
    mine = (torch.cat(features), torch.cat(labels), torch.cat(ids)) if features else None
    if world > 1:
        everyone: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * world
        dist.all_gather_object(everyone, mine)
    else:
        everyone = [mine]
    whole = [part for part in everyone if part is not None]
    features_ND, labels_N, ids_N = (torch.cat([part[i] for part in whole]) for i in range(3))
    # Ranks hold interleaved parts; sorted by id the result is the same for every number of ranks.
    order_N = ids_N.argsort()
    return features_ND[order_N], labels_N[order_N]
