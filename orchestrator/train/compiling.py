"""Running compiled parts eager, and trading memory for recomputation."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from itpn_core.errors import ConfigError
from itpn_core.task import Task


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
