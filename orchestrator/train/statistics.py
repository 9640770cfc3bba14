"""Target statistics: computed once, over a fixed list of samples, and equal on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from itpn_core.pretraining.tasks import PretrainTask
from torch import Tensor

from orchestrator.config.tree import PretrainConfig
from orchestrator.data.loader import EvalView, open_loader
from orchestrator.data.manifest import Split
from orchestrator.train.context import RunContext


def fit_statistics(task: PretrainTask, config: PretrainConfig, split: Split, run: RunContext) -> None:
    """Gives the task the mean and spread of its targets, if it normalises by them.

    Rank 0 measures and the others receive, so that all ranks hold the same bits whatever their hardware.
    """
    if not task.needs_target_statistics:
        return
    if run.rank == 0:
        run.progress("measuring target statistics")
        task.fit_target_statistics(_images(config, split, run.device))
    if run.world > 1:
        for buffer in task.target_statistics():
            dist.broadcast(buffer, src=0)


def _images(config: PretrainConfig, split: Split, device: torch.device) -> Iterator[Tensor]:
    samples = min(config.objective.target_samples, split.samples)
    view = EvalView(ids=spread_ids(split.samples, samples))
    with open_loader(
        config.data, split, seed=0, epoch=0, global_batch=config.eval.batch, rank=0, world=1, view=view
    ) as batches:
        for batch in batches:
            yield batch.images.to(device).float() / 255


def spread_ids(samples: int, count: int) -> Tensor:
    """`count` sample ids at equal distances over a split; int64 [count]. Fixed, so that every run uses the same."""
    return torch.arange(count, dtype=torch.int64) * samples // count
