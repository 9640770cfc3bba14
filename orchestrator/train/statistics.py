"""Target statistics: computed once, over a fixed list of samples, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from itpn_core.pretraining.base import PretrainTask
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Split
from orchestrator.data.views import EvalView
from orchestrator.train.context import RunContext


def fit_statistics(task: PretrainTask, config: PretrainConfig, split: Split, run: RunContext) -> None:
    """Gives the task the mean and spread of its targets, if it normalises by them.

    Every rank reads the same images in the same batches and so holds the same bits; DDP's start-up broadcast from rank
    0 covers ranks with other hardware.
    """
    if task.needs_statistics:
        run.progress("measuring target statistics")
        task.fit_target_statistics(_images(config, split, run.device))


def _images(config: PretrainConfig, split: Split, device: torch.device) -> Iterator[Tensor]:
    view = EvalView(config.data.image_size, config.eval.crop, min(config.objective.target_samples, split.samples))
    with open_loader(
        config.data,
        split,
        seed=0,
        epoch=0,
        first_batch=0,
        global_batch=config.eval.batch,
        rank=0,
        world=1,
        view=view,
    ) as batches:
        for batch in batches:
            images = batch.images[batch.valid].to(device).float() / 255
            yield images.double() if config.train.precision == "fp64" else images
