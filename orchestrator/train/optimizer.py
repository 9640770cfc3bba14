"""Parameter groups, AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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


def lr_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """Learning rate of a step as a fraction of the peak: linear warm-up, then cosine down to `min_lr_ratio`.

    Args:
        step: 0-based optimizer step.
        total: steps of the whole run.
        config: warm-up fraction and final ratio.
    """
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


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
