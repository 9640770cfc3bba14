"""Model FLOPs utilisation: what the model computes per second, as a share of what the device could at most."""

from __future__ import annotations

import torch

from itpn_core.evaluation.cost import count_flops
from itpn_core.evaluation.peaks import listed_peak
from itpn_core.task import Examples, Task


def peak_tflops(stated: float, device: torch.device) -> float:
    """The peak that utilisation is measured against, in TFLOP/s: the stated one, else the table's; 0 = unknown."""
    if stated:
        return stated
    if device.type != "cuda":
        return 0.0
    return listed_peak(torch.cuda.get_device_name(device))


def training_flops(task: Task, image_size: int, device: torch.device) -> float:
    """FLOPs of one image in one training step: targets once, the student's forward pass three times.

    The backward pass of a matrix product is two products of the same size. Recomputation of activations is not counted:
    it is not the model's work. Counted on two images, as some tasks mix pairs.
    """
    images = torch.zeros(2, 3, image_size, image_size, device=device, dtype=next(task.parameters()).dtype)
    whole = torch.ones(2, dtype=torch.bool, device=device)
    number = torch.arange(2, device=device)
    mode = task.training
    task.eval()
    try:
        examples = Examples(images, number * 0, whole, number, slice(0, 2))
        targets = count_flops(lambda: task.prepare(examples))
        with torch.no_grad():
            inputs, wanted = task.prepare(examples)
        forward = count_flops(lambda: task(inputs, wanted, examples.keys))
    finally:
        task.train(mode)
    return (targets + 3 * forward) / 2


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
