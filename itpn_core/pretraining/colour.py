"""Brightness, contrast and saturation of images in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from itpn_core.constants import constant

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's grey conversion


def recolour(x_B3HW: Tensor, factor_B3: Tensor) -> Tensor:
    """Brightness, contrast, saturation in this order, each blended with its neutral image and cut to [0, 1].

    Args:
        x_B3HW: images in [0, 1].
        factor_B3: the three factors of each image; 1 changes nothing, a saturation of 0 gives grey.
    """
    brightness, contrast, saturation = factor_B3.to(x_B3HW.dtype)[:, :, None, None, None].unbind(1)
    x_B3HW = (x_B3HW * brightness).clamp_(0.0, 1.0)
    mean_B111 = _grey(x_B3HW).mean(dim=(-1, -2), keepdim=True)
    x_B3HW = torch.lerp(mean_B111.expand_as(x_B3HW), x_B3HW, contrast).clamp_(0.0, 1.0)
    return torch.lerp(_grey(x_B3HW).expand_as(x_B3HW), x_B3HW, saturation).clamp_(0.0, 1.0)


def _grey(x_B3HW: Tensor) -> Tensor:
    return (x_B3HW * constant(_LUMA, x_B3HW.dtype, x_B3HW.device)[:, None, None]).sum(1, keepdim=True)
