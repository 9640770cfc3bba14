"""Detection on the pyramid: torchvision's Faster and Mask R-CNN, COCO data, pycocotools' average precision."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from itpn_core.models.dense import DetectionPyramid
from orchestrator.dense.backbone import Opened
from orchestrator.dense.coco import CocoSplit
from orchestrator.dense.config import DetectConfig, DetectorConfig
from orchestrator.dense.train import draws

_LEVELS = 5
_POOLED = ["0", "1", "2", "3"]
_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def build_detector(opened: Opened, config: DetectorConfig, classes: int) -> nn.Module:
    """A detector on strides p/4, p/2, p, 2p and 4p (4 to 64 for 16-pixel patches), the last two pooled.

    Args:
        opened: backbone with pyramid, mean and std.
        config: kind, sizes, thresholds.
        classes: object classes, the background not counted.
    """
    patch = opened.model.config.patch_size
    strides = [max(1, patch * 2**level // 4) for level in range(_LEVELS)]
    sizes = tuple((int(config.anchor_scale * stride),) for stride in strides)
    options: dict[str, Any] = {
        "num_classes": classes + 1,
        "min_size": list(config.min_size),
        "max_size": config.max_size,
        "image_mean": list(opened.mean),
        "image_std": list(opened.std),
        "size_divisible": 2 * patch,
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * _LEVELS),
        "box_roi_pool": MultiScaleRoIAlign(_POOLED, 7, 2),
        "box_score_thresh": config.score_threshold,
        "box_detections_per_img": config.detections,
        "box_batch_size_per_image": config.box_batch,
    }
    pyramid = DetectionPyramid(opened.model)
    if config.kind == "faster_rcnn":
        detector: nn.Module = FasterRCNN(pyramid, **options)
    else:
        detector = MaskRCNN(pyramid, mask_roi_pool=MultiScaleRoIAlign(_POOLED, 14, 2), **options)
    return detector


class Detection:
    """The detection task (`orchestrator.dense.train.DenseTask`).

    Args:
        config: settings.
        opened: backbone with pyramid.
        train: checked training split.
        val: checked validation split.
    """

    def __init__(self, config: DetectConfig, opened: Opened, train: CocoSplit, val: CocoSplit) -> None:
        self._config = config
        self._train, self._val = train, val
        self._masks = config.detector.kind == "mask_rcnn"
        self.backbone = opened.model
        self.model = build_detector(opened, config.detector, len(train.categories))
        self.samples = len(train.image_ids)

    def sample(self, index: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image [3, H, W] in [0, 1] and its targets, perhaps mirrored."""
        image, target = self._train.image(index), self._train.target(index, masks=self._masks)
        if self._config.train.flip and draws(self._config.train.seed, epoch, index, "flip", 1)[0] < 0.5:
            image, target = mirrored(image, target)
        return image, target

    def losses(self, samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Torchvision's losses by name."""
        images = [image.to(device) for image, _ in samples]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in samples]
        losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Average precision of boxes and, with masks, of masks, as pycocotools defines them."""
        found = [
            entry
            for index, image_id in enumerate(self._val.image_ids)
            for entry in self._detections(self.model([self._val.image(index).to(device)])[0], image_id)
        ]
        kinds = [("bbox", "box"), *([("segm", "mask")] if self._masks else [])]
        return {
            f"{name}_{stat}": value
            for kind, name in kinds
            for stat, value in average_precision(self._val.coco, found, kind).items()
        }

    def _detections(self, out: dict[str, Tensor], image_id: int) -> list[dict[str, Any]]:
        """One image's detections as COCO results."""
        boxes = out["boxes"].float().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        masks: list[dict[str, Any] | None] = [None] * len(boxes)
        if "masks" in out:
            masks = [_encoded(mask) for mask in (out["masks"][:, 0] > 0.5).cpu().numpy()]
        category = {label: number for number, label in self._val.labels.items()}
        return [
            {
                "image_id": image_id,
                "category_id": category[int(label)],
                "bbox": box.tolist(),
                "score": float(score),
                **({} if mask is None else {"segmentation": mask}),
            }
            for box, label, score, mask in zip(boxes, out["labels"], out["scores"], masks, strict=True)
        ]


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image, boxes and masks left to right."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def _encoded(mask_HW: Any) -> dict[str, Any]:
    code = rle.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def average_precision(truth: COCO, found: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """COCO's average precision.

    Args:
        truth: annotations.
        found: results in COCO's format.
        kind: "bbox" or "segm".

    Returns:
        "ap" (over IoU .5 to .95), "ap50", "ap75" and by size; sizes of which there are no objects are left out.
    """
    if not found:
        return dict.fromkeys(_STATS[:3], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes would derive boxes and areas from masks if they were there
        entries = [{k: v for k, v in entry.items() if k != "segmentation" or kind == "segm"} for entry in found]
        if kind == "segm":
            entries = [{k: v for k, v in entry.items() if k != "bbox"} for entry in entries]
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(_STATS, evaluation.stats, strict=False) if value >= 0}
