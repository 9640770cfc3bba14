"""Compiling a task part by part with `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from itpn_core.task import Task

VARIANTS = 64
"""Compiled variants of one piece of code that are kept before torch falls back to running it eager."""


def blocks(task: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: entries of its module lists that have parameters, outermost first."""
    for module in task.children():
        if isinstance(module, nn.ModuleList):
            yield from (child for child in module if any(True for _ in child.parameters()))
        else:
            yield from blocks(module)


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks, and what stands beside their lists: embeddings, merges and splits, heads."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield from (child for child in module if any(True for _ in child.parameters()))
        elif any(isinstance(part, nn.ModuleList) for part in module.modules()):
            yield from parts(module)
        elif any(True for _ in module.parameters()):
            yield module


def compile_task(task: Task, backend: str = "inductor") -> int:
    """Compiles in place, state names stay; what the task names itself (a frozen teacher, the mask) in any case.

    One block's graph serves all blocks of its kind, so compiling takes seconds where the whole model takes minutes.

    Args:
        task: what is trained.
        backend: torch.compile's.

    Returns:
        How many modules were marked; they are compiled when they are called first.
    """
    # Blocks of one class share their code, and torch counts variants (width, gradients on or off, batch) per code.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    found = [*parts(task), *task.compilable()]
    for part in found:
        part.compile(backend=backend)
    return len(found)
