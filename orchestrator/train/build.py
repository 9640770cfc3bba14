"""What an engine starts from: the order of the samples and a fresh training state."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from itpn_core.compiling import compile_task
from orchestrator.config.tree import JobConfig
from orchestrator.data.order import SampleOrder
from orchestrator.train.compiling import checkpoint_gradients
from orchestrator.train.kind import Kind
from orchestrator.train.optimizer import build_optimizer, parameter_groups, peak_lr
from orchestrator.train.parallel import Parallel, Replicated, Sharded
from orchestrator.train.precision import LossScale
from orchestrator.train.spikes import LossHistory
from orchestrator.train.state import TrainState, WeightAverage


def training_order(config: JobConfig, samples: int) -> SampleOrder:
    """The order of samples that a configuration stands for."""
    data = config.data
    return SampleOrder(samples, config.train.seed, data.streams, data.run, data.block_runs, data.last_batch)


def build_state(
    config: JobConfig, kind: Kind[Any], device: torch.device, world: int = 1, mesh: DeviceMesh | None = None
) -> TrainState:
    """A fresh training state; equal on every rank because the seed is.

    Args:
        config: resolved configuration.
        kind: what is trained.
        device: where to compute.
        world: number of ranks.
        mesh: how they share the parameters; None = each holds all of them.
    """
    torch.manual_seed(config.train.seed)
    task = kind.build_task().to(device)
    if config.train.precision == "fp64":
        task = task.double()
    task.train()
    if config.train.grad_checkpointing:
        checkpoint_gradients(task)
    if config.train.compile:
        compile_task(task, config.train.compile_backend)
    if config.train.teacher_stream:
        task.teach_beside(device)
    parallel: Parallel = Replicated(task, device, world) if mesh is None else Sharded(task, mesh)
    lr = peak_lr(config.train.optimizer, config.train.global_batch)
    depths = kind.depths(task)
    groups = parameter_groups(
        parallel.trainable,
        config.train.optimizer,
        lr,
        depths.__getitem__ if depths else None,
        max(depths.values(), default=0),
    )
    optimizer = build_optimizer(groups, config.train.optimizer)
    average = WeightAverage(parallel.trainable, config.train.optimizer.average_decay)
    mean = torch.zeros((), device=device, dtype=torch.float64 if config.train.precision == "fp64" else torch.float32)
    scale = LossScale(config.train.precision == "fp16", config.train.loss_scale, device)
    history = LossHistory(config.train.guard.loss_sigma, device)
    return TrainState(task, parallel, optimizer, average, grad_norm_mean=mean, loss_history=history, loss_scale=scale)
