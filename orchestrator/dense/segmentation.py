"""Segmentation on the pyramid: heads of segmentation_models_pytorch, mean IoU of torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from orchestrator.dense.backbone import Opened
from orchestrator.dense.config import IGNORED, HeadConfig, SegmentConfig
from orchestrator.dense.masks import MaskSplit
from orchestrator.dense.train import draws

_DEPTH = 5
_LEVELS = 4


class Segmenter(nn.Module):
    """Backbone with pyramid, head, class scores at the size of the image.

    Args:
        opened: backbone with pyramid, mean and std.
        config: kind and width of the head.
        classes: number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, opened: Opened, config: HeadConfig, classes: int) -> None:
        super().__init__()
        self.backbone = opened.model
        self.register_buffer("mean", torch.tensor(opened.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(opened.std).view(1, -1, 1, 1), persistent=False)
        # the library counts image and stride 2 as levels, of which its heads read neither
        channels = [opened.model.config.in_chans, 0, *(opened.model.pyramid_dim,) * _LEVELS]
        if config.kind == "upernet":
            self.decoder: nn.Module = UPerNetDecoder(channels, _DEPTH, config.channels)
            width = config.channels
        else:
            narrow = max(1, config.channels // 2)
            # groups of GroupNorm in the library's blocks
            narrow = max(32, narrow // 32 * 32)
            self.decoder = FPNDecoder(channels, _DEPTH, config.channels, narrow)
            width = narrow
        self.classifier = SegmentationHead(width, classes, kernel_size=1)
        initialize_decoder(self.decoder)
        initialize_head(self.classifier)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Scores [B, classes, H, W] of images in [0, 1]; any size, padded here to what the levels need."""
        height, width = images_B3HW.shape[-2:]
        step = 2 * self.backbone.config.patch_size
        normed = (images_B3HW - self.mean) / self.std
        padded = F.pad(normed, (0, -width % step, 0, -height % step))
        maps = self.backbone.forward_intermediates(padded, intermediates_only=True)
        scores = self.classifier(self.decoder([padded, padded, *maps]))
        full = F.interpolate(scores.float(), padded.shape[-2:], mode="bilinear", align_corners=False)
        return full[..., :height, :width]


class Segmentation:
    """The segmentation task (`orchestrator.dense.train.DenseTask`).

    Args:
        config: settings; `data.classes` names the classes.
        opened: backbone with pyramid.
        train: checked training split.
        val: checked validation split.
    """

    def __init__(self, config: SegmentConfig, opened: Opened, train: MaskSplit, val: MaskSplit) -> None:
        self._config = config
        self._train, self._val = train, val
        self.backbone = opened.model
        self.model: nn.Module = Segmenter(opened, config.head, len(config.data.classes))
        self.samples = len(train.pairs)

    def sample(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] in [0, 1] and mask [H, W]: resized, cropped and mirrored by chance."""
        data, seed = self._config.data, self._config.train.seed
        image, mask = self._train.image(index), self._train.mask(index)
        size, top, left, side = draws(seed, epoch, index, "crop", 4)
        image, mask = _resized(image, mask, data.scale[0] + size * (data.scale[1] - data.scale[0]))
        if data.crop:
            rows, cols = (
                slice(*_window(length, data.crop, at)) for length, at in zip(mask.shape, (top, left), strict=True)
            )
            image, mask = image[:, rows, cols], mask[rows, cols]
        if self._config.train.flip and side < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask

    def losses(self, samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Cross-entropy over the pixels that count; images of other sizes are padded to the largest."""
        images_B3HW, masks_BHW = collate(samples)
        scores = self.model(images_B3HW.to(device))
        masks_BHW = masks_BHW.to(device)
        counted = (masks_BHW != IGNORED).sum().clamp(min=1)
        # a sum over a count, as the mean of no pixel would be no number
        loss = F.cross_entropy(scores, masks_BHW, ignore_index=IGNORED, reduction="sum") / counted
        return {"cross_entropy": loss}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Mean IoU over the classes that occur, IoU per class, and the share of pixels that are right."""
        classes = self._config.data.classes
        index = MulticlassJaccardIndex(len(classes), average=None, ignore_index=IGNORED, validate_args=False).to(device)
        right = counted = 0
        seen = torch.zeros(len(classes), dtype=torch.bool)
        for place in range(len(self._val.pairs)):
            mask_HW = self._val.mask(place).to(device)
            answer_HW = self.model(self._val.image(place).to(device)[None]).argmax(1)[0]
            index.update(answer_HW[None], mask_HW[None])
            valid = mask_HW != IGNORED
            right += int((answer_HW == mask_HW)[valid].sum())
            counted += int(valid.sum())
            seen |= torch.bincount(mask_HW[valid].flatten(), minlength=len(classes)).cpu() > 0
        per_class = index.compute().cpu()
        named = {f"iou/{_plain(name)}": float(v) for name, v, s in zip(classes, per_class, seen, strict=True) if s}
        return {"miou": float(per_class[seen].mean()), "pixel_accuracy": right / max(1, counted), **named}


def _plain(name: str) -> str:
    """A class name as a metric's name can hold it."""
    return "".join(c if c.isalnum() or c in "_-." else "_" for c in name)


def _resized(image: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    if factor == 1.0:
        return image, mask
    size = [max(1, round(length * factor)) for length in mask.shape]
    bigger = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    nearest = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    return bigger.clamp(0, 1), nearest


def _window(length: int, crop: int, at: float) -> tuple[int, int]:
    """Start and stop of a crop; the whole length where it is shorter."""
    start = int(at * (max(0, length - crop) + 1))
    return start, start + min(length, crop)


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] padded with zeros and masks [B, H, W] padded with the ignored index."""
    height = max(mask.shape[0] for _, mask in samples)
    width = max(mask.shape[1] for _, mask in samples)
    images, masks = [], []
    for image, mask in samples:
        pad = (0, width - mask.shape[1], 0, height - mask.shape[0])
        images.append(F.pad(image, pad))
        masks.append(F.pad(mask, pad, value=IGNORED))
    return torch.stack(images), torch.stack(masks)
