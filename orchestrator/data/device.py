"""Augmentation of a whole batch on the device: flip and colour, seeded by (seed, epoch, sample id)."""

from __future__ import annotations

import torch
from torch import Tensor

from itpn_core.constants import constant
from itpn_core.pretraining.colour import recolour
from itpn_core.random import stream_keys, uniform
from orchestrator.data.config import AugmentConfig


def augment(images_B3HW: Tensor, ids_B: Tensor, seed: int, epoch: int, config: AugmentConfig) -> Tensor:
    """Turns stored pixels into the batch that the task prepares its images and targets from.

    Args:
        images_B3HW: uint8 [B, 3, H, W] on the training device.
        ids_B: int64 [B] sample ids, any device.
        seed: the run's seed.
        epoch: 0-based epoch.
        config: which changes, how strong.

    Returns:
        float32 [B, 3, H, W] in [0, 1] on the same device; a sample's result does not depend on the others.
    """
    ids_B = ids_B.to(images_B3HW.device, non_blocking=True)
    x_B3HW = images_B3HW.to(torch.float32).div_(255.0)
    if config.flip > 0:
        flipped_B = uniform(stream_keys(seed, epoch, ids_B, "flip"), 1)[:, 0] < config.flip
        x_B3HW = torch.where(flipped_B[:, None, None, None], x_B3HW.flip(-1), x_B3HW)
    if max(config.brightness, config.contrast, config.saturation) > 0:
        strengths = (config.brightness, config.contrast, config.saturation)
        strength_3 = constant(strengths, x_B3HW.dtype, x_B3HW.device)
        draws_B3 = uniform(stream_keys(seed, epoch, ids_B, "colour"), 3)
        x_B3HW = recolour(x_B3HW, 1.0 + strength_3 * (2.0 * draws_B3 - 1.0))
    return x_B3HW
