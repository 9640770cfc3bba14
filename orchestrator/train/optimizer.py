"""Parameter groups, AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.tree import JobConfig
from orchestrator.train.config import OptimizerConfig

NO_DECAY_NAMES = ("pos_embed", "mask_token", "bias_table", "gathering_tokens", "gamma", "cls_token")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices yes; norms, biases, layer-scales, embeddings and tokens no."""
    return parameter.ndim >= 2 and not any(part in name for part in NO_DECAY_NAMES)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    lr: float,
    layer_of: Callable[[str], int] | None = None,
    layers: int = 0,
) -> list[dict[str, Any]]:
    """Groups for AdamW by decay and, with `layer_decay` below 1, by depth.

    Args:
        parameters: (name, parameter) pairs; those without gradients are left out.
        config: decay and layer decay.
        lr: peak learning rate.
        layer_of: depth of a parameter by name, 0 = stem; needed only with layer decay.
        layers: depth of the head; a parameter's rate is `lr * layer_decay ** (layers - depth)`.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = config.layer_decay ** (layers - layer_of(name)) if layer_of else 1.0
        decay = decays(name, parameter)
        group = groups.setdefault(
            (decay, scale),
            {"params": [], "names": [], "lr": lr * scale, "scale": scale, "weight_decay": config.weight_decay * decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW: one kernel per group on GPU, one pass over memory on CPU."""
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def peak_lr(config: OptimizerConfig, global_batch: int) -> float:
    """Peak learning rate after the linear scaling rule (Goyal et al. 2017), when `lr_batch` asks for it."""
    return config.lr * global_batch / config.lr_batch if config.lr_batch else config.lr


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step: linear warm-up, then cosine down to `min_ratio` of the peak.

    Attributes:
        total: steps of the whole run.
        warmup: steps before the peak.
        peak: learning rate at the top.
        min_ratio: learning rate at the end, as a fraction of the peak.
    """

    total: int
    warmup: int
    peak: float
    min_ratio: float

    def lr(self, step: int) -> float:
        """Of a 0-based optimizer step."""
        if step < self.warmup:
            return self.peak * ((step + 1) / (self.warmup + 1))
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_schedule(config: OptimizerConfig, global_batch: int, total: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a run.

    Args:
        config: peak, warm-up and final ratio.
        global_batch: images per step, for the scaling rule.
        total: steps of the whole run.
        steps_per_epoch: for a warm-up that is given in epochs.
    """
    if config.warmup_epochs:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    else:
        warmup = config.warmup_steps or round(config.warmup_fraction * total)
    return Schedule(total, min(warmup, total), peak_lr(config, global_batch), config.min_lr_ratio)


def derived_lines(config: JobConfig, schedule: Schedule | None = None) -> str:
    """What a job's settings come to, as lines of comment below their YAML.

    Args:
        config: resolved configuration.
        schedule: of a run, where its length is known.
    """
    optimizer, batch = config.train.optimizer, config.train.global_batch
    rule = f"lr {optimizer.lr:g} x global batch {batch} / lr_batch {optimizer.lr_batch}"
    why = rule if optimizer.lr_batch else "lr as it is: lr_batch=0 asks for no scaling"
    lines = [f"peak learning rate {peak_lr(optimizer, batch):g} ({why})"]
    if schedule is not None:
        lines.append(f"{schedule.total} steps, {schedule.warmup} of them warm-up")
    return "".join(f"# derived: {line}\n" for line in lines)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's learning rate, keeping the groups' layer-decay scales."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name (`<name>/exp_avg` …), so that it needs no pickle and survives regrouping."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave.

    Raises:
        ValueError: a parameter has no state, or state of another shape.
    """
    if not tensors:
        return  # saved before the first step
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            try:
                state = {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            except KeyError as error:
                raise ValueError(f"optimizer state of parameter {name!r} is missing: {error}") from None
            if state["exp_avg"].shape != parameter.shape:
                raise ValueError(
                    f"optimizer state of {name!r} has shape {tuple(state['exp_avg'].shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
