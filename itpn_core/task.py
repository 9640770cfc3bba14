"""What the training engine asks of anything that it trains: pre-training objectives and fine-tuning alike.

    images, targets = task.prepare(examples)       # no gradient
    output = task(images, targets, keys)           # per-sample losses
    output.loss_B.sum() / global_batch -> backward, optimizer step
    task.ema_update(progress)                      # moves the moving-average teacher, if there is one

Images are float in [0, 1]; the task normalises them. Every random choice derives from the samples' keys, and losses are
per sample, so that they add up exactly over ranks and micro-batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itpn_core.errors import WeightsError


class TaskOutput(NamedTuple):
    """What one forward pass returns; each entry belongs to one sample alone.

    Attributes:
        loss_B: [B], float32 or float64.
        parts: named [B] tensors without gradient, for the record (not all of them are summands of the loss).
    """

    loss_B: Tensor  # noqa: N815
    parts: dict[str, Tensor]


class Examples(NamedTuple):
    """Samples as the engine hands them over.

    Attributes:
        images: float [B, 3, H, W] in [0, 1], augmented.
        labels: int64 [B]; -1 in a hole.
        valid: bool [B], False where a sample could not be read.
        keys: int64 [B], one key per sample and epoch.
        own: the samples whose losses are wanted. The others, at most one on either side and only for a task that is
            `paired`, complete pairs of the global batch.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor
    keys: Tensor
    own: slice = slice(None)


class Task(nn.Module):
    """Base class of everything the engine trains.

    Args:
        student: the model that is trained, evaluated and exported.
    """

    title = "this task"
    """For messages."""
    paired = False
    """Whether slots 2i and 2i+1 of the global batch must be at hand together."""
    watched = False
    """Whether the engine should feed `watch` with the features' health."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    @abstractmethod
    def prepare(self, examples: Examples) -> tuple[Tensor, Any]:
        """The images the student will see and what it should answer, of `examples.own`, without gradient."""

    @abstractmethod
    def forward(self, images_B3HW: Tensor, targets: Any, keys_B: Tensor) -> TaskOutput:
        """Per-sample losses.

        Args:
            images_B3HW: float in [0, 1], from `prepare`.
            targets: from `prepare`.
            keys_B: int64 [B], one key per sample and epoch.
        """

    def compilable(self) -> list[nn.Module]:
        """What compiling pays for outside the student."""
        return []

    def teach_beside(self, device: torch.device) -> None:
        """Has a frozen teacher work beside the student on a GPU; nothing to do for tasks without one.

        Args:
            device: where the task is.
        """
        del device

    def ema_update(self, progress: float) -> None:
        """Moves the moving-average teacher one step; nothing to do for tasks without one.

        Args:
            progress: share of the run that is done, 0..1.
        """
        del progress

    def watch(self, step: int, health: Mapping[str, float]) -> None:
        """Looks at the features' health; a task that is `watched` raises `CollapseError` when it is bad."""
        del step, health

    def persistent_state(self) -> dict[str, Tensor]:
        """All that must survive a restart, by name."""
        return dict(self.state_dict())

    def load_persistent_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a `persistent_state`.

        Raises:
            WeightsError: if it belongs to another model or task.
        """
        try:
            self.load_state_dict(dict(state))
        except RuntimeError as error:
            raise WeightsError(f"The saved state does not fit {self.title}: {error}") from error
