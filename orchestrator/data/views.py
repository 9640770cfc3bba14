"""Which part of an image becomes the square that the model sees, and how it is resized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from itpn_core.random import stream_keys_numpy, uniform_numpy
from orchestrator.data.config import AugmentConfig, DataConfig
from orchestrator.data.decode import ImageHWC
from orchestrator.data.strong import DRAWS_PER_OP, ERASE_DRAWS, erase, rand_augment

Box = tuple[int, int, int, int]  # top, left, height, width
_TRIES = 10
_DRAWS = 2 * _TRIES + 2


class View(Protocol):
    """A way to cut one square of `image_size` out of an image."""

    image_size: int

    def draws(self, seed: int, epoch: int, ids_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Random numbers of each sample, float32 [B, n]."""

    def box(self, height: int, width: int, draws: npt.NDArray[np.float32]) -> Box:
        """The part of an image that is shown, given its row of `draws`."""

    def finish(self, out_3SS: Tensor, draws: npt.NDArray[np.float32]) -> None:
        """Changes the rendered square in place, given its row of `draws`."""


@dataclass(frozen=True)
class TrainView:
    """Random-resized crop (Szegedy et al. 2015) and strong augmentation, seeded by (seed, epoch, sample id).

    Attributes:
        image_size: side of the result in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
        augment: RandAugment and erasing are done here, what is cheaper for whole batches on the device.
    """

    image_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augment: AugmentConfig = AugmentConfig()

    def draws(self, seed: int, epoch: int, ids_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As `View.draws`."""
        wanted = {
            "crop": _DRAWS,
            "rand_augment": DRAWS_PER_OP * self.augment.rand_ops,
            "erase": ERASE_DRAWS if self.augment.erase else 0,
        }
        parts = [uniform_numpy(stream_keys_numpy(seed, epoch, ids_B, name), n) for name, n in wanted.items() if n]
        return np.concatenate(parts, axis=1)

    def box(self, height: int, width: int, draws: npt.NDArray[np.float32]) -> Box:
        """As `View.box`: the first of ten draws that fits, else the largest centred box of an allowed ratio."""
        u = draws[:_DRAWS].tolist()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_TRIES):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[2 * attempt])
            ratio = math.exp(low + (high - low) * u[2 * attempt + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        h, w = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
        return (height - h) // 2, (width - w) // 2, h, w

    def finish(self, out_3SS: Tensor, draws: npt.NDArray[np.float32]) -> None:
        """As `View.finish`: RandAugment, then erasing."""
        config, u = self.augment, draws[_DRAWS:].tolist()
        rand = DRAWS_PER_OP * config.rand_ops
        if config.rand_ops:
            out_3SS.copy_(rand_augment(out_3SS, u[:rand], config.rand_magnitude, config.rand_spread))
        if config.erase:
            erase(out_3SS, u[rand:], config.erase)


@dataclass(frozen=True)
class EvalView:
    """Centre crop of a resized image, the same at every call.

    Attributes:
        image_size: side of the result in pixels.
        crop: side of the crop as a share of the image's shorter side.
        samples: so many samples at equal distances over the split; 0 = all.
    """

    image_size: int
    crop: float = 0.875
    samples: int = 0

    def draws(self, seed: int, epoch: int, ids_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As `View.draws`: none."""
        return np.empty((len(ids_B), 0), dtype=np.float32)

    def box(self, height: int, width: int, draws: npt.NDArray[np.float32]) -> Box:
        """As `View.box`."""
        side = max(1, round(min(height, width) * self.crop))
        return (height - side) // 2, (width - side) // 2, side, side

    def finish(self, out_3SS: Tensor, draws: npt.NDArray[np.float32]) -> None:
        """As `View.finish`: nothing."""


def train_view(config: DataConfig) -> TrainView:
    """The view that a configuration trains on."""
    return TrainView(config.image_size, config.crop_scale, config.crop_ratio, config.augment)


def render(image_HWC: ImageHWC, box: Box, out_3SS: Tensor) -> None:
    """Cuts the box out of an image and resizes it (antialiased bicubic on uint8) into `out_3SS`.

    The crop is a view of the decoded pixels; grey images are resized in one channel and repeated.

    Args:
        image_HWC: uint8 [H, W, 3] or [H, W, 1], writable (torch refuses to wrap read-only memory quietly).
        box: part of the image.
        out_3SS: uint8 [3, S, S], filled in place.
    """
    top, left, height, width = box
    crop_CHW = torch.from_numpy(image_HWC[top : top + height, left : left + width]).permute(2, 0, 1)
    size = list(out_3SS.shape[-2:])
    if [height, width] != size:
        crop_CHW = interpolate(crop_CHW[None], size, mode="bicubic", antialias=True)[0]
    out_3SS.copy_(crop_CHW)  # copies and, for grey images, repeats the channel
