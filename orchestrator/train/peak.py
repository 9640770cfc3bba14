"""Model FLOPs utilisation: what the model computes per second, as a share of what the device could at most."""

from __future__ import annotations

import torch

from itpn_core.evaluation.cost import training_flops
from itpn_core.evaluation.peaks import listed_peak
from itpn_core.task import Task


def peak_tflops(stated: float, device: torch.device) -> float:
    """The peak that utilisation is measured against, in TFLOP/s: the stated one, else the table's; 0 = unknown."""
    if stated:
        return stated
    if device.type != "cuda":
        return 0.0
    return listed_peak(torch.cuda.get_device_name(device))


class Utilisation:
    """Turns images per second into a share of the peak of all devices; 0 where no peak is known.

    Args:
        task: what is trained.
        image_size: side of its images in pixels.
        stated_peak: TFLOP/s of one device; 0 = look it up.
        device: one of the devices.
        world: how many there are.
    """

    def __init__(self, task: Task, image_size: int, stated_peak: float, device: torch.device, world: int) -> None:
        peak = peak_tflops(stated_peak, device)
        self._share = training_flops(task, image_size, device) / (peak * 1e12 * world) if peak else 0.0

    def of(self, images_per_second: float) -> float:
        """Model FLOPs utilisation, 0..1."""
        return self._share * images_per_second
