"""Strong augmentation of one decoded sample: RandAugment (Cubuk et al. 2020) and random erasing (Zhong et al. 2020).

The operators are torchvision's; which are used and how strongly follows timm's `rand-m9-mstd0.5-inc1`, the published
fine-tuning's choice. Every number comes from the sample's own draws, so an image looks the same whoever decodes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from itpn_core.random import uniform_numpy

# ImageNet's mean colour fills what a geometric operator uncovers, and is the centre of the erasing noise.
_FILL: Final = (124.0, 116.0, 104.0)
_SPREAD: Final = (58.0, 57.0, 57.0)
_TOP: Final = 10.0  # strongest magnitude
DRAWS_PER_OP: Final = 5
_TRIES: Final = 10
ERASE_DRAWS: Final = 2 * _TRIES + 5
_AREA: Final = (0.02, 1 / 3)
_RATIO: Final = (0.3, 1 / 0.3)

Operator = Callable[[Tensor, float], Tensor]
"""Image [3, S, S] uint8 and a level in [-1, 1] (the sign matters to some) -> image."""


def _shear(x: Tensor, first: float, second: float) -> Tensor:
    degrees = [math.degrees(math.atan(first)), math.degrees(math.atan(second))]
    return _affine(x, shear=degrees)


def _affine(
    x: Tensor, *, angle: float = 0.0, translate: tuple[float, float] = (0, 0), shear: list[float] | None = None
) -> Tensor:
    out: Tensor = tvf.affine_image(
        x,
        angle=angle,
        translate=[round(v) for v in translate],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=list(_FILL),
    )
    return out


def _solarize_add(x: Tensor, level: float) -> Tensor:
    return torch.where(x < 128, (x.to(torch.int16) + int(110 * abs(level))).clamp(max=255).to(torch.uint8), x)


# The order is part of the definition: a draw chooses by position.
OPERATORS: Final[dict[str, Operator]] = {
    "autocontrast": lambda x, _: tvf.autocontrast_image(x),
    "equalize": lambda x, _: tvf.equalize_image(x),
    "invert": lambda x, _: tvf.invert_image(x),
    "rotate": lambda x, level: _affine(x, angle=30 * level),
    "posterize": lambda x, level: tvf.posterize_image(x, 4 - int(4 * abs(level))),
    "solarize": lambda x, level: tvf.solarize_image(x, 256 - min(256, int(256 * abs(level)))),
    "solarize_add": _solarize_add,
    "colour": lambda x, level: tvf.adjust_saturation_image(x, 1 + 0.9 * level),
    "contrast": lambda x, level: tvf.adjust_contrast_image(x, 1 + 0.9 * level),
    "brightness": lambda x, level: tvf.adjust_brightness_image(x, 1 + 0.9 * level),
    "sharpness": lambda x, level: tvf.adjust_sharpness_image(x, 1 + 0.9 * level),
    "shear_x": lambda x, level: _shear(x, 0.3 * level, 0.0),
    "shear_y": lambda x, level: _shear(x, 0.0, 0.3 * level),
    "translate_x": lambda x, level: _affine(x, translate=(0.45 * level * x.shape[-1], 0.0)),
    "translate_y": lambda x, level: _affine(x, translate=(0.0, 0.45 * level * x.shape[-2])),
}


def rand_augment(image_3SS: Tensor, draws: list[float], magnitude: float, spread: float) -> Tensor:
    """Applies a few operators, each with probability one half.

    Args:
        image_3SS: uint8 [3, S, S].
        draws: `DRAWS_PER_OP` uniform numbers per operator.
        magnitude: mean strength, 0..10.
        spread: its standard deviation.
    """
    operators = list(OPERATORS.values())
    for at in range(0, len(draws), DRAWS_PER_OP):
        which, applied, radius, turn, sign = draws[at : at + DRAWS_PER_OP]
        if applied >= 0.5:
            continue
        normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * turn)  # Box-Muller
        level = min(max(magnitude + spread * normal, 0.0), _TOP) / _TOP
        image_3SS = operators[int(which * len(operators))](image_3SS, level if sign < 0.5 else -level)
    return image_3SS


def erase(image_3SS: Tensor, draws: list[float], probability: float) -> None:
    """Replaces a box by noise around the mean colour, in place.

    Area 2% to a third, aspect 0.3 to 1/0.3, as published; the noise is cut at black and white (ours: pixels are still
    uint8 here).

    Args:
        image_3SS: uint8 [3, S, S].
        draws: `ERASE_DRAWS` uniform numbers.
        probability: of erasing at all.
    """
    if draws[0] >= probability:
        return
    height, width = image_3SS.shape[-2:]
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for attempt in range(_TRIES):
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[1 + 2 * attempt])
        ratio = math.exp(low + (high - low) * draws[2 + 2 * attempt])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(draws[-4] * (height - h + 1)), int(draws[-3] * (width - w + 1))
            image_3SS[:, top : top + h, left : left + w] = _noise((3, h, w), draws[-2:])
            return


def _noise(shape: tuple[int, int, int], key_draws: list[float]) -> Tensor:
    """Normal noise as uint8; two 24-bit draws make the key."""
    key = int(key_draws[0] * (1 << 24)) << 24 | int(key_draws[1] * (1 << 24))
    count = math.prod(shape)
    u_2N = uniform_numpy(np.array([key], dtype=np.uint64), 2 * count).reshape(2, count).astype(np.float64)
    normal_N = np.sqrt(-2 * np.log1p(-u_2N[0])) * np.cos(2 * np.pi * u_2N[1])
    noise = torch.from_numpy(normal_N.reshape(shape))
    mean, spread = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (_FILL, _SPREAD))
    return (mean + spread * noise).round().clamp(0, 255).to(torch.uint8)
