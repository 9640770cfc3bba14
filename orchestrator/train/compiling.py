"""Compiling a task block by block, and trading memory for recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from itpn_core.errors import ConfigError
from itpn_core.task import Task

VARIANTS = 64
"""Compiled variants of one block's code that are kept before torch falls back to running it eager."""


def blocks(task: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: entries of its module lists that have parameters, outermost first."""
    for module in task.children():
        if isinstance(module, nn.ModuleList):
            yield from (child for child in module if any(True for _ in child.parameters()))
        else:
            yield from blocks(module)


def compile_blocks(task: Task, backend: str) -> int:
    """Compiles every block in place (state names stay) and the frozen teacher as a whole.

    One block's graph serves all blocks of its kind, so compiling takes seconds where the whole model takes minutes.

    Returns:
        How many modules were marked; they are compiled when they are called first.
    """
    # Blocks of one class share their code, and torch counts variants (width, gradients on or off, batch) per code.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    parts = list(blocks(task))
    teacher = getattr(task, "teacher", None)
    if isinstance(teacher, nn.Module):
        parts.append(teacher)
    for part in parts:
        part.compile(backend=backend)
    return len(parts)


def checkpoint_gradients(task: Task) -> None:
    """Keeps no activations inside the student's blocks; the backward pass computes them again.

    Raises:
        ConfigError: the student cannot do that.
    """
    if not hasattr(task.student, "grad_checkpointing"):
        raise ConfigError("train.grad_checkpointing", True, f"{task.title} has no blocks that can be computed again")
    task.student.grad_checkpointing = True


def run_eager() -> AbstractContextManager[None]:
    """A context in which compiled blocks run as they are written: for evaluation, whose shapes come once."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
