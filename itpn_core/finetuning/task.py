"""Supervised classification with a hierarchical backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.finetuning.config import FinetuneTaskConfig
from itpn_core.finetuning.mixing import mix_pairs, soft_labels
from itpn_core.models.backbone import Backbone
from itpn_core.models.config import ModelConfig
from itpn_core.models.init import init_head
from itpn_core.pretraining.teachers import ImageNorm, at_least_float32
from itpn_core.random import derive
from itpn_core.task import Examples, Task, TaskOutput


class ClassifyTask(Task):
    """A backbone with the published classifier on top: mean over tokens, norm, linear layer.

    The loss of a sample is the cross-entropy with its (smoothed, mixed) label distribution.

    Args:
        model: shape of the backbone; token reduction as its settings say.
        config: head, labels and mixing.
        classes: outputs of the head.
    """

    title = "this classifier"

    def __init__(self, model: ModelConfig, config: FinetuneTaskConfig, classes: int) -> None:
        super().__init__(Backbone(model, num_classes=classes, final_norm="pooled"))
        self.config = config
        self.classes = classes
        self.paired = config.mixes
        self.normalise = ImageNorm(config.mean, config.std)
        init_head(self.student.head, config.head_scale)

    @torch.no_grad()
    def prepare(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Mixes neighbours and returns the images and label distributions of the examples' own part."""
        smoothing = self.config.label_smoothing
        targets_BY = soft_labels(examples.labels, self.classes, smoothing, at_least_float32(examples.images).dtype)
        images, targets = mix_pairs(examples.images, targets_BY, examples.keys, examples.valid, self.config)
        return images[examples.own], targets[examples.own]

    def forward(self, images_B3HW: Tensor, targets: Tensor, keys_B: Tensor) -> TaskOutput:
        """Per-sample cross-entropy; `targets` are label distributions [B, Y]."""
        logits_BY = at_least_float32(self.student(self.normalise(images_B3HW), derive(keys_B, "drop_path")))
        return TaskOutput(-(targets * F.log_softmax(logits_BY, dim=1)).sum(dim=1), {})

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Class scores [B, Y] of images in [0, 1]."""
        return at_least_float32(self.student(self.normalise(images_B3HW)))
