"""What the guard against loss spikes knows of the past: running mean and deviation of the loss, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

WARM_UP = 20
"""Steps before anything is refused: the deviation of fewer says little."""
_NEW = 0.01
"""Weight of a new loss, once a hundred are known; until then all count alike."""


class LossHistory:
    """Tells a loss that stands out from those before it. Nothing in here waits for the device.

    Args:
        sigmas: a loss this many deviations above the mean is refused; 0 = none is.
        device: of the losses.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.tensor = torch.zeros(3, device=device, dtype=torch.float64)
        """[mean, variance, steps]; belongs to the training state."""

    @torch.no_grad()
    def stands_out(self, loss: Tensor) -> Tensor:
        """Bool, scalar: whether the loss of the whole batch is not finite or far above the mean."""
        mean, variance, steps = self.tensor
        above: Tensor = (steps >= WARM_UP) & (loss > mean + self.sigmas * variance.sqrt())
        return above | ~torch.isfinite(loss)

    @torch.no_grad()
    def take(self, loss: Tensor, refused: Tensor) -> None:
        """Adds the loss of a step, unless the step was refused."""
        mean, variance, steps = self.tensor
        weight = torch.clamp(1 / (steps + 1), min=_NEW)
        away = loss - mean
        moved = torch.stack((mean + weight * away, (1 - weight) * (variance + weight * away * away), steps + 1))
        self.tensor.copy_(torch.where(refused > 0, self.tensor, moved))
