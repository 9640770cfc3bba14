"""Augmentation of a whole batch on the device: flip and colour, seeded by (seed, epoch, sample id)."""

from __future__ import annotations

import torch
from torch import Tensor

from itpn_core.random import stream_keys, uniform
from orchestrator.data.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's grey conversion


def augment(images_B3HW: Tensor, ids_B: Tensor, seed: int, epoch: int, config: AugmentConfig) -> Tensor:
    """Turns stored pixels into the batch that both student and teacher see.

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
        x_B3HW = _colour(x_B3HW, uniform(stream_keys(seed, epoch, ids_B, "colour"), 3), config)
    return x_B3HW


def _colour(x_B3HW: Tensor, draws_B3: Tensor, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation in this order, each blended with its neutral image and cut to [0, 1]."""
    strength_3 = draws_B3.new_tensor([config.brightness, config.contrast, config.saturation])
    factor_B3 = 1.0 + strength_3 * (2.0 * draws_B3 - 1.0)
    brightness, contrast, saturation = factor_B3[:, :, None, None, None].unbind(1)
    x_B3HW = (x_B3HW * brightness).clamp_(0.0, 1.0)
    mean_B111 = _grey(x_B3HW).mean(dim=(-1, -2), keepdim=True)
    x_B3HW = torch.lerp(mean_B111.expand_as(x_B3HW), x_B3HW, contrast).clamp_(0.0, 1.0)
    return torch.lerp(_grey(x_B3HW).expand_as(x_B3HW), x_B3HW, saturation).clamp_(0.0, 1.0)


def _grey(x_B3HW: Tensor) -> Tensor:
    return (x_B3HW * x_B3HW.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
