"""The training loop of dense tasks: one process, images of any size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from itpn_core.errors import UserError
from itpn_core.finetuning.depth import parameter_depths
from itpn_core.models.backbone import Backbone
from itpn_core.random import name_key, stream_keys_numpy, uniform_numpy
from orchestrator.dense.config import DenseTrainConfig
from orchestrator.train.optimizer import build_optimizer, make_schedule, parameter_groups, set_lr
from orchestrator.train.precision import autocast_dtype

Say = Callable[[str], None]
Record = Callable[[int, dict[str, float]], None]
_SIGNED = (1 << 63) - 1


class DenseTask(Protocol):
    """What the loop asks of detection and of segmentation."""

    model: nn.Module
    backbone: Backbone
    samples: int
    """Training images."""

    def sample(self, index: int, epoch: int) -> Any:
        """One augmented training image with its targets; a function of its arguments alone. Called in threads."""

    def losses(self, samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Summands of the loss, each a mean over the batch."""

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Metrics on all validation images, the model in eval mode and without gradients."""


def train(task: DenseTask, config: DenseTrainConfig, say: Say, record: Record) -> dict[str, float]:
    """Trains for `config.steps` steps and evaluates.

    Args:
        task: model and data.
        config: length, batch, optimizer, device.
        say: prints a line.
        record: takes metrics of a step.

    Returns:
        The metrics of the final evaluation.

    Raises:
        UserError: the loss is not finite.
    """
    device = pick_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    model = task.model.to(device).train()
    schedule = make_schedule(config.optimizer, config.batch, config.steps, 0)
    optimizer = build_optimizer(_groups(task, config, schedule.peak), config.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    metrics: dict[str, float] = {}
    since, begun = 0, time.perf_counter()
    for step, samples in enumerate(batches(task, config)):
        # dropout and the detectors' sampling of boxes draw from torch's generator
        torch.manual_seed(name_key(config.seed, step, "dense-step") & _SIGNED)
        set_lr(optimizer, schedule.lr(step))
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            losses = task.losses(samples, device)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_grad_norm or math.inf)
        _check_finite(step, losses, norm, config)
        optimizer.step()
        torch.autograd.graph.increment_version(parameters)  # a fused optimizer does not, and caches go by it
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            values = {"loss": total.item(), **{name: value.item() for name, value in losses.items()}}
            speed = (done - since) * config.batch / (time.perf_counter() - begun)
            record(done, {**{f"train/{k}": v for k, v in values.items()}, "train/images_per_second": speed})
            say(f"step {done}/{config.steps}  loss {values['loss']:.4f}  {speed:.1f} images/s")
            since, begun = done, time.perf_counter()
        if done == config.steps or (config.eval_every and done % config.eval_every == 0):
            metrics = evaluate(task, device)
            record(done, {f"eval/{name}": value for name, value in metrics.items()})
            say("evaluation: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
            model.train()
            since, begun = done, time.perf_counter()
    return metrics


@torch.no_grad()
def evaluate(task: DenseTask, device: torch.device) -> dict[str, float]:
    """Metrics of the model as it is."""
    task.model.to(device).eval()
    return task.evaluate(device)


def pick_device(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        UserError: a GPU where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device='cuda', but torch sees no GPU. Use auto or cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _groups(task: DenseTask, config: DenseTrainConfig, lr: float) -> list[dict[str, Any]]:
    """Parameters by decay and, with layer decay, by depth; new heads learn at the full rate."""
    named = list(task.model.named_parameters())
    if config.optimizer.layer_decay == 1.0:
        return parameter_groups(named, config.optimizer, lr)
    depths = {id(p): d for (n, d) in parameter_depths(task.backbone).items() for p in [task.backbone.get_parameter(n)]}
    by_name = dict(named)
    top = max(depths.values())
    return parameter_groups(named, config.optimizer, lr, lambda name: depths.get(id(by_name[name]), top), top)


def _check_finite(step: int, losses: dict[str, Tensor], norm: Tensor, config: DenseTrainConfig) -> None:
    if not bool(torch.isfinite(norm)):
        parts = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        raise UserError(
            f"the gradient is not finite at step {step + 1} ({parts}). Lower train.optimizer.lr="
            f"{config.optimizer.lr:g}, or raise train.optimizer.warmup_fraction."
        )


def batches(task: DenseTask, config: DenseTrainConfig) -> Iterator[list[Any]]:
    """Batches of every step, decoded ahead by threads: a pure function of the seed, whatever the threads do."""
    with ThreadPoolExecutor(config.readers, thread_name_prefix="dense-reader") as pool:

        def start(step: int) -> list[Any]:
            places = range(step * config.batch, (step + 1) * config.batch)
            pairs = [divmod(place, task.samples) for place in places]
            return [pool.submit(task.sample, int(order(epoch)[place]), epoch) for epoch, place in pairs]

        orders: dict[int, Any] = {}

        def order(epoch: int) -> Any:
            if epoch not in orders:
                orders[epoch] = epoch_order(config.seed, epoch, task.samples)
            return orders[epoch]

        ahead = start(0)
        for step in range(config.steps):
            now, ahead = ahead, start(step + 1) if step + 1 < config.steps else []
            yield [future.result() for future in now]


def epoch_order(seed: int, epoch: int, count: int) -> Any:
    """Order of the training images in an epoch: int64 [count]."""
    return np.argsort(stream_keys_numpy(seed, epoch, np.arange(count), "order"), kind="stable")


def draws(seed: int, epoch: int, index: int, name: str, count: int) -> list[float]:
    """Numbers in [0, 1) of one named choice for one image."""
    return [float(v) for v in uniform_numpy(stream_keys_numpy(seed, epoch, [index], name), count)[0]]
