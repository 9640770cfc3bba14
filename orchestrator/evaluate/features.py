"""Features of many images on many ranks, gathered where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.errors import DataError
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Split
from orchestrator.data.views import EvalView

Extract = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] on the device -> features [B, D]."""
DAMAGED = "damaged"
"""Name under which the places of damaged images are kept beside those that were answered rightly."""


class Collected(NamedTuple):
    """Features of a view's images, without those that are damaged."""

    features: Tensor
    """float32 [N, D], on the CPU like all of it."""
    labels: Tensor
    """int64 [N]."""
    places: Tensor
    """int64 [N], place of each row among the view's images, ascending."""
    damaged: list[int]
    """Places of the images that could not be read, of which `data.quarantine_budget` allows some."""


def right_or_not(known: dict[str, list[int]], count: int) -> dict[str, Tensor]:
    """Whether each image was answered rightly, by what was measured; damaged ones count for nobody.

    Args:
        known: places of what was right, and of what is damaged, as evaluators fill it.
        count: images of the view.
    """
    whole_N = torch.ones(count, dtype=torch.bool)
    whole_N[torch.tensor(known.get(DAMAGED, []), dtype=torch.int64)] = False
    flags = {}
    for name, places in known.items():
        if name != DAMAGED:
            right_N = torch.zeros(count, dtype=torch.bool)
            right_N[torch.tensor(places, dtype=torch.int64)] = True
            flags[name] = right_N[whole_N]
    return flags


def note_damaged(known: dict[str, list[int]], found: Collected) -> None:
    """Adds the view's damaged images to what is known of it."""
    if found.damaged:
        known[DAMAGED] = sorted({*known.get(DAMAGED, []), *found.damaged})


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
) -> Collected:
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
        The same on every rank.

    Raises:
        DataError: no image at all could be read.
    """
    features, labels, ids, holes = [], [], [], []
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
            whole_B = item.valid
            holes += item.ids[~whole_B].tolist()
            if whole_B.any():
                images = item.images if whole_B.all() else item.images[whole_B]
                features.append(extract(images.to(device, non_blocking=True)).float().cpu())
                labels.append(item.labels[whole_B])
                ids.append(item.ids[whole_B])
    mine = (torch.cat(features), torch.cat(labels), torch.cat(ids)) if features else None
    everyone: list[tuple[tuple[Tensor, Tensor, Tensor] | None, list[int]]] = [(mine, holes)]
    if world > 1:
        everyone = [(None, [])] * world
        dist.all_gather_object(everyone, (mine, holes))
    parts = [part for part, _ in everyone if part is not None]
    if not parts:
        raise DataError(f"no image of the split {split.name!r} could be read for an evaluation; all are damaged")
    features_ND, labels_N, ids_N = (torch.cat([part[i] for part in parts]) for i in range(3))
    # Ranks hold interleaved parts; sorted by id the result is the same for every number of ranks.
    order_N = ids_N.argsort()
    holes = sorted(hole for _, some in everyone for hole in some)
    all_V = torch.cat([ids_N, torch.tensor(holes, dtype=torch.int64)]).sort().values
    places_N, damaged = (torch.searchsorted(all_V, some) for some in (ids_N[order_N], torch.tensor(holes).long()))
    return Collected(features_ND[order_N], labels_N[order_N], places_N, damaged.tolist())
