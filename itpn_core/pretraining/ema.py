"""Masked feature modeling against the student's own moving average, at every level of the pyramid.

The paper names the idea ("moving-average backbone", supervision at several stages) but no settings: momentum, target
normalisation, level weights and predictors are ours (docs/pretraining.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from itpn_core.models.config import ModelConfig
from itpn_core.models.fast_student import FastStudent
from itpn_core.models.layers import layer_norm
from itpn_core.models.layout import take_patches, to_map
from itpn_core.pretraining.base import PretrainTask
from itpn_core.pretraining.colour import recolour
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.targets import masked_ids, plain_instance_norm, plain_layer_norm, smooth_l1
from itpn_core.pretraining.teachers import EmaTeacher, Grid, at_least_float32, cosine_momentum
from itpn_core.random import derive, uniform
from itpn_core.task import Examples, TaskOutput

LEVELS = ("p16", "p8", "p4")

_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": plain_layer_norm,
    "layer": plain_layer_norm,
    "instance": plain_instance_norm,
    "none": lambda level: level,
}


class HeadlessStudent(FastStudent):
    """The Fast-iTPN student up to its pyramid: no fusion head, as nothing would train it."""

    def __init__(self, config: ModelConfig, pyramid_dim: int, **kwargs: Any) -> None:
        super().__init__(config, 1, pyramid_dim, **kwargs)
        del self.decoder_embed, self.lm_head


def predictor(width: int, hidden: int = 0) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear: keeps the student's features from having to equal the targets."""
    hidden = hidden or width
    return nn.Sequential(layer_norm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class EmaTask(PretrainTask):
    """EMA MFM: SmoothL1 to the moving average's features of the whole image, over the cells of masked patches.

    The student sees the masked image; the teacher, in evaluation mode, the same crop without a mask. Targets are the
    three pyramid levels, LayerNorm without affine per cell, or with `target_norm=instance` standardised per image and
    channel. Each level's loss is a mean over its cells and channels. With `loss_tokens=all` (ours) the cells of visible
    patches count too: the features of whole images, which evaluation reads, are then trained directly.

    Two more of our additions, both off unless asked for. With `student_colour` and `student_grey` the student's image
    has other colours than the teacher's, which it must see through. With `image_weight` a fourth loss compares whole
    images: the mean of the student's visible stage-3 tokens must tell the mean of the teacher's (data2vec 2.0,
    arXiv 2212.07525, and MSN, arXiv 2204.07141, do so with a class token).

    Args:
        model: shape of the student (family "fast").
        config: the objective.
        image_size: (height, width) of the images.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, image_size: Grid) -> None:
        scale = config.stem_gradient_scale
        student = HeadlessStudent(model, config.pyramid_dim, stem_gradient_scale=scale, img_size=image_size)
        super().__init__(model, config, student, None)
        self.predictors = nn.ModuleList(
            predictor(config.pyramid_dim) if config.ema_predictor else nn.Identity() for _ in LEVELS
        )
        self.image_predictor = self._image_predictor(model.embed_dim) if config.image_weight else None
        self.ema = EmaTeacher(student)
        self._norm = _NORMS[config.target_norm]
        self._weights = tuple(weight / sum(config.level_weights) for weight in config.level_weights)

    def _image_predictor(self, width: int) -> nn.Module:
        return predictor(width, 2 * width) if self.config.ema_predictor else nn.Identity()

    @torch.no_grad()
    def prepare(self, examples: Examples) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The images in the student's colours, and targets of the images as they are."""
        return self.student_view(examples.images, examples.keys), self.targets(examples.images)

    def student_view(self, images_B3HW: Tensor, keys_B: Tensor) -> Tensor:
        """The images with brightness, contrast and saturation of their own, some of them grey."""
        strength, grey = self.config.student_colour, self.config.student_grey
        if not strength and not grey:
            return images_B3HW
        draws_B4 = uniform(derive(keys_B, "student_colour"), 4)
        factor_B3 = 1.0 + strength * (2.0 * draws_B4[:, :3] - 1.0)
        factor_B3[:, 2] = torch.where(draws_B4[:, 3] < grey, 0.0, factor_B3[:, 2])
        return recolour(images_B3HW, factor_B3)

    @torch.no_grad()
    def targets(self, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        """Features of the moving average per level: [B, N, S, F] with S = 1, 4, 16 cells per patch.

        With `image_weight` there is a fourth: the mean of its stage-3 tokens [B, E], LayerNorm without affine.
        """
        x_BNE, _, levels = self.ema.module.encode(self.normalise(images_B3HW))
        targets = tuple(self._norm(at_least_float32(level)) for level in levels)
        if self.image_predictor is None:
            return targets
        return (*targets, plain_layer_norm(at_least_float32(x_BNE).mean(dim=1)))

    def forward(self, images_B3HW: Tensor, targets: tuple[Tensor, ...], keys_B: Tensor) -> TaskOutput:
        """Per-sample losses; see `PretrainTask.forward`."""
        mask_BN = self.mask(keys_B)
        only_BM = masked_ids(mask_BN, self.mask_count) if self.config.loss_tokens == "masked" else None
        images_B3HW, drop_keys_B = self.normalise(images_B3HW), derive(keys_B, "drop_path")
        x_BNE, _, levels = self.student.encode(images_B3HW, mask_BN, drop_keys_B, only_BM)
        losses: dict[str, Tensor] = {}
        parts = zip(LEVELS, self.predictors, levels, targets[: len(LEVELS)], strict=True)
        for name, predict, level, target in parts:
            wanted = target if only_BM is None else take_patches(target, only_BM)
            losses[f"loss_{name}"] = smooth_l1(at_least_float32(predict(level)), wanted)
        total_B = sum(weight * loss_B for weight, loss_B in zip(self._weights, losses.values(), strict=True))
        if self.image_predictor is not None:
            prediction_BE = self.image_predictor(self._visible_mean(mask_BN, x_BNE))
            losses["loss_image"] = smooth_l1(at_least_float32(prediction_BE), targets[-1])
            total_B = total_B + self.config.image_weight * losses["loss_image"]
        return TaskOutput(total_B, {name: loss_B.detach() for name, loss_B in losses.items()})  # type: ignore[arg-type]

    def _visible_mean(self, mask_BN: Tensor, x_BNE: Tensor) -> Tensor:
        """Mean of the tokens of visible patches [B, E]: masked ones are guesses."""
        kept_BN1 = ~mask_BN[:, :, None]
        return torch.where(kept_BN1, x_BNE, 0).sum(dim=1) / (mask_BN.shape[1] - self.mask_count)

    def ema_update(self, progress: float) -> None:
        """Moves the teacher one step with the momentum of this moment of the run."""
        momentum = cosine_momentum(progress, self.config.ema_momentum, self.config.ema_momentum_end)
        self.ema.update(self.student, momentum)

    @torch.no_grad()
    def levels(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """The student's pyramid features of whole images per level: [B, cells, F]."""
        mode = self.training
        self.train(False)
        _, _, levels = self.student.encode(self.normalise(images_B3HW))
        self.train(mode)
        return {name: at_least_float32(level).flatten(1, 2) for name, level in zip(LEVELS, levels, strict=True)}

    def picture(self, images_B3HW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Targets of every level and their predictions from the masked image."""
        _, _, levels = self.student.encode(self.normalise(images_B3HW), mask_BN)
        predictions = [predict(level) for predict, level in zip(self.predictors, levels, strict=True)]
        grid = self.student.grid
        targets = zip(LEVELS, self.targets(images_B3HW)[: len(LEVELS)], strict=True)
        return {f"teacher/{name}": to_map(target, grid) for name, target in targets} | {
            f"student/{name}": to_map(prediction, grid) for name, prediction in zip(LEVELS, predictions, strict=True)
        }
