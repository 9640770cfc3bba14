"""Objectives with fixed targets: a teacher's tokens (Fast-iTPN, CLIP iTPN) and pixels (pixel iTPN)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from itpn_core.models.config import ModelConfig
from itpn_core.models.layout import take_patches, to_map
from itpn_core.models.pixel_student import patch_pixels
from itpn_core.models.pyramid import Levels
from itpn_core.pretraining.base import PretrainTask
from itpn_core.pretraining.beside import Beside, Pending, arrived
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.targets import (
    ChannelStatistics,
    cosines,
    masked_ids,
    masked_mean,
    masked_mse,
    normalised_pixels,
    plain_layer_norm,
    smooth_l1,
    tokens_of,
)
from itpn_core.pretraining.teachers import Teacher, at_least_float32
from itpn_core.random import derive
from itpn_core.task import Examples, TaskOutput


class TeacherTask(PretrainTask):
    """Objectives whose targets are an external teacher's tokens, normalised as `target_norm` says."""

    target_mean: Tensor
    target_std: Tensor
    target_fitted: Tensor

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, student: Any, teacher: Teacher) -> None:
        super().__init__(model, config, student, teacher)
        default = "layer" if config.kind == "clip" else "none"
        self.target_norm = default if config.target_norm == "auto" else config.target_norm
        if self.target_norm == "channel":
            self.register_buffer("target_mean", torch.zeros(teacher.width))
            self.register_buffer("target_std", torch.ones(teacher.width))
            self.register_buffer("target_fitted", torch.zeros((), dtype=torch.bool))
        self._fitted = self.target_norm != "channel"
        self._beside: Beside | None = None

    def teach_beside(self, device: torch.device) -> None:
        """Computes targets on a stream of their own from now on.

        The teacher's kernels then fill what the student's leave free of the GPU; its activations need memory of their
        own beside the student's.

        Args:
            device: where the task is; nothing changes unless it is a CUDA device.
        """
        self._beside = Beside(device) if device.type == "cuda" else None

    @property
    def needs_statistics(self) -> bool:
        """Whether `fit_target_statistics` must run before the first step of a new run."""
        return not self._fitted

    @torch.no_grad()
    def fit_target_statistics(self, batches: Iterable[Tensor]) -> None:
        """Takes the channel statistics of the teacher's tokens, once, over a fixed list of images.

        Every rank calls it with the same images, in the same order and batches, and so gets the same bits.

        Args:
            batches: float [B, 3, H, W] in [0, 1]; evaluation views of the first `target_samples` training images.

        Raises:
            ValueError: if there is no batch.
        """
        if self.target_norm != "channel" or self.teacher is None:
            return
        statistics = ChannelStatistics(self.teacher.width, self.target_mean.device)
        for images_B3HW in batches:
            statistics.update(tokens_of(self.teacher(images_B3HW)))
        mean_C, std_C = statistics.result()
        self.target_mean.copy_(mean_C)
        self.target_std.copy_(std_C)
        self.target_fitted.fill_(True)
        self._fitted = True

    def load_persistent_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a `persistent_state`, target statistics included."""
        super().load_persistent_state(state)
        if self.target_norm == "channel":
            self._fitted = bool(self.target_fitted.item())

    @torch.no_grad()
    def targets(self, images_B3HW: Tensor) -> Tensor:
        """Normalised teacher tokens [B, N, T], at least float32.

        Raises:
            ValueError: if channel statistics are needed and were not taken.
        """
        if not self._fitted or self.teacher is None:
            raise ValueError("target_norm=channel: call fit_target_statistics before the first step.")
        tokens_BNT = tokens_of(self.teacher(images_B3HW))
        if self.target_norm == "channel":
            return (tokens_BNT - self.target_mean) / self.target_std
        return plain_layer_norm(tokens_BNT) if self.target_norm == "layer" else tokens_BNT

    @torch.no_grad()
    def prepare(self, examples: Examples) -> tuple[Tensor, Tensor | Pending]:
        """The images as they are, and their targets, which may still be on their way."""
        images = examples.images
        return images, self._beside(self.targets, images) if self._beside else self.targets(images)

    def _fine(self, levels: Levels) -> dict[str, Tensor]:
        """Maps of the pyramid levels that are finer than the teacher's tokens."""
        return {f"student/{name}": to_map(getattr(levels, name), self.student.grid) for name in ("p8", "p4")}


class FastTask(TeacherTask):
    """Fast-iTPN: minus the mean cosine between predicted and teacher tokens, over masked patches.

    With `loss_tokens=all` (ours) the visible patches count too, as in the CLIP flavour: the features of whole images
    are then trained directly, which pays in runs of minutes.
    """

    def forward(self, images_B3HW: Tensor, targets: Tensor | Pending, keys_B: Tensor) -> TaskOutput:
        """Per-sample losses; see `PretrainTask.forward`."""
        mask_BN = self.mask(keys_B)
        only_BM = masked_ids(mask_BN, self.mask_count) if self.config.loss_tokens == "masked" else None
        prediction = self.student(self.normalise(images_B3HW), mask_BN, derive(keys_B, "drop_path"), only_BM)
        targets_BNT = arrived(targets)
        wanted = targets_BNT if only_BM is None else take_patches(targets_BNT, only_BM)
        similarity = cosines(at_least_float32(prediction), wanted)
        if only_BM is not None:
            return TaskOutput(-similarity.mean(dim=1), {})
        masked_B = masked_mean(similarity.detach(), mask_BN, self.mask_count)
        return TaskOutput(-similarity.mean(dim=1), {"loss_masked": -masked_B})

    def picture(self, images_B3HW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Teacher tokens, the student's prediction from the masked image, and its finer pyramid levels."""
        _, _, levels = self.student.encode(self.normalise(images_B3HW), mask_BN)
        return self._pair(images_B3HW, self.student.head(levels)) | self._fine(levels)


class ClipTask(TeacherTask):
    """CLIP iTPN: SmoothL1 on all tokens, from the pyramid head and from the auxiliary head, with equal weights."""

    def forward(self, images_B3HW: Tensor, targets: Tensor | Pending, keys_B: Tensor) -> TaskOutput:
        """Per-sample losses; see `PretrainTask.forward`."""
        heads = self.student(self.normalise(images_B3HW), self.mask(keys_B), derive(keys_B, "drop_path"))
        targets = arrived(targets)
        pyramid_B, auxiliary_B = (smooth_l1(at_least_float32(head), targets) for head in heads)
        parts = {"loss_pyramid": pyramid_B.detach(), "loss_auxiliary": auxiliary_B.detach()}
        return TaskOutput(pyramid_B + auxiliary_B, parts)

    def picture(self, images_B3HW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Teacher tokens and the pyramid head's prediction."""
        prediction_BNT, _ = self.student(self.normalise(images_B3HW), mask_BN)
        return self._pair(images_B3HW, prediction_BNT)


class PixelTask(PretrainTask):
    """Pixel iTPN: squared error on the masked patches' pixels, normalised per patch."""

    @torch.no_grad()
    def targets(self, images_B3HW: Tensor) -> Tensor:
        """Normalised pixels of every patch [B, N, patch * patch * 3]."""
        return normalised_pixels(patch_pixels(self.normalise(images_B3HW), self.model_config.patch_size))

    def forward(self, images_B3HW: Tensor, targets: Tensor, keys_B: Tensor) -> TaskOutput:
        """Per-sample losses; see `PretrainTask.forward`."""
        mask_BN = self.mask(keys_B)
        drop_keys_B = derive(keys_B, "drop_path")
        prediction_BND = self.student(self.normalise(images_B3HW), mask_BN, drop_keys_B, masked=self.mask_count)
        loss_B = masked_mse(at_least_float32(prediction_BND), targets, mask_BN, self.mask_count)
        return TaskOutput(loss_B, {})

    def picture(self, images_B3HW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Normalised pixels and their prediction."""
        prediction_BND = self.student(self.normalise(images_B3HW), mask_BN, masked=self.mask_count)
        return self._pair(images_B3HW, prediction_BND)
