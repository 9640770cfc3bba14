"""Where the targets come from: frozen image models behind one protocol, and the moving average of the student.

A teacher takes images in [0, 1], resizes and normalises them itself, and returns a map of features. Teachers are never
trained: evaluation mode always, no gradients, and what lies above the tapped feature is removed from the model.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.errors import ConfigError, WeightsError, nearest
from itpn_core.models.checkpoint import read_weights
from itpn_core.pretraining.config import TeacherConfig
from itpn_core.pretraining.weights import load_in_order, load_named, package_weights
from itpn_core.reduction.model import Reducible

Grid = tuple[int, int]


class Teacher(nn.Module):
    """A frozen source of targets: images [B, 3, H, W] in [0, 1] -> features [B, C, h, w].

    Attributes:
        width: C.
        image_size: (height, width) at which the teacher looks at the images.
        mean: subtracted per channel from the images.
        std: divides the images per channel.
    """

    width: int
    image_size: Grid
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def grid_for(self, height: int, width: int) -> Grid:
        """Grid (h, w) of the features for images of the given size."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever is asked."""
        del mode
        return super().train(False)


class ImageNorm(nn.Module):
    """(image - mean) / std per channel; the constants move with the module but are not saved."""

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalises images in [0, 1]."""
        return (images_BCHW - self.mean) / self.std  # type: ignore[operator]


def _create(config: TeacherConfig) -> nn.Module:
    """Builds the timm model and loads its weights."""
    base = config.model.split(".")[0]
    if not config.model.startswith("hf-hub:") and not timm.is_model(base):
        raise ConfigError(
            "objective.teacher.model", config.model, "is not a timm model", nearest(base, timm.list_models())
        )
    kind, _, name = config.weights.partition(":")
    if kind == "hub":
        try:
            hub_model: nn.Module = timm.create_model(config.model, pretrained=True)
            return hub_model
        except (OSError, RuntimeError) as error:
            hint = "Put a weights file on this machine and set objective.teacher.weights to its path."
            raise WeightsError(f"Could not get the weights of {config.model} from the hub ({error}). {hint}") from error
    model: Any = timm.create_model(config.model, pretrained=False)
    if kind == "package":
        load_in_order(model, package_weights(name))
    else:
        classifier = model.pretrained_cfg.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        path = Path(config.weights).expanduser()
        load_named(model, read_weights(path), () if config.projected else names, str(path))
    loaded: nn.Module = model
    return loaded


def _tap(model: Any, config: TeacherConfig) -> tuple[int, int, bool]:
    """Finds the feature: its index among timm's intermediates, its stride, and whether the final norm applies."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError("objective.teacher.model", config.model, "must be a timm model with intermediate features")
    infos = [info if isinstance(info, dict) else vars(info) for info in model.feature_info]
    strides = [int(info["reduction"]) for info in infos]
    if len(set(strides)) == 1:
        if not -len(strides) <= config.block < len(strides):
            raise ConfigError("objective.teacher.block", config.block, f"must lie in -1..{len(strides) - 1}")
        index = config.block % len(strides)
        return index, strides[0], index == len(strides) - 1
    if config.stride not in strides:
        known = ", ".join(map(str, sorted(set(strides))))
        raise ConfigError("objective.teacher.stride", config.stride, f"must be one of {known} for {config.model}")
    return len(strides) - 1 - strides[::-1].index(config.stride), config.stride, False


class TimmTeacher(Teacher):
    """Any timm model as a teacher: feature maps of convolutional nets, tokens of CLIP, SigLIP, DINO and other ViTs.

    Convolutional and hierarchical models give the deepest feature of `config.stride`. Plain ViTs give the patch tokens
    of `config.block`; the last block's pass the final norm and, with `config.projected`, the output projection.

    Args:
        config: which model, weights and feature.
        grid: (h, w) of the student's tokens; the teacher looks at images of the size that gives the same grid.

    Raises:
        ConfigError: if the model, the feature or the size is impossible.
        WeightsError: if the weights cannot be read or belong to another model.
    """

    def __init__(self, config: TeacherConfig, grid: Grid) -> None:
        super().__init__()
        model: Any = _create(config)
        self._index, self.stride, self._norm = _tap(model, config)
        if config.projected and not (self._norm and isinstance(getattr(model, "head", None), nn.Linear)):
            hint = "Use a CLIP image tower and its last block, or switch the projection off."
            raise ConfigError("objective.teacher.projected", True, f"{config.model} has no output projection", hint)
        self.projection: nn.Module = model.head if config.projected else nn.Identity()
        side = config.image_size
        self.image_size = (side, side) if side else (grid[0] * self.stride, grid[1] * self.stride)
        self._resize_model(model, config)
        # Nothing above the tapped feature is needed; timm removes it, so it costs neither time nor memory.
        model.prune_intermediate_layers([self._index], prune_norm=not self._norm, prune_head=True)
        # Convolutions run up to twice as fast on CPU (and with tensor cores) when the channels stand last.
        self.model = model.to(memory_format=torch.channels_last)
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        self.normalise = ImageNorm(self.mean, self.std)
        self.requires_grad_(False)
        self.train()
        self.width, self._grid = self._measure()

    def _resize_model(self, model: Any, config: TeacherConfig) -> None:
        """Resamples the positions of models that are built for one image size."""
        native = tuple(model.pretrained_cfg.get("input_size", (3, 0, 0))[1:])
        if native == self.image_size or not hasattr(model, "set_input_size"):
            return
        if any(side % self.stride for side in self.image_size):
            allowed = f"must be a multiple of the teacher's stride {self.stride}"
            raise ConfigError("objective.teacher.image_size", config.image_size, allowed)
        model.set_input_size(img_size=self.image_size)

    @torch.no_grad()
    def _measure(self) -> tuple[int, Grid]:
        """Width and grid of the features, read from the model rather than believed."""
        features_BCHW = self(torch.zeros(1, 3, *self.image_size))
        return features_BCHW.shape[1], (features_BCHW.shape[2], features_BCHW.shape[3])

    def grid_for(self, height: int, width: int) -> Grid:
        """Grid of the features: the same for every image, as all are resized to `image_size`."""
        del height, width
        return self._grid

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features of images in [0, 1].

        Args:
            images_B3HW: any size; resized (bilinear, antialiased) to `image_size`.

        Returns:
            [B, C, h, w] in at least float32, whatever autocast does inside.
        """
        if tuple(images_B3HW.shape[2:]) != self.image_size:
            images_B3HW = F.interpolate(
                images_B3HW, self.image_size, mode="bilinear", align_corners=False, antialias=True
            )
        features_BCHW: Tensor = self.model.forward_intermediates(
            self.normalise(images_B3HW).contiguous(memory_format=torch.channels_last),
            indices=[self._index],
            norm=self._norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )[0]
        if not isinstance(self.projection, nn.Identity):
            features_BCHW = self.projection(features_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return at_least_float32(features_BCHW)


class EmaTeacher(nn.Module):
    """The moving average of a student, updated once per optimizer step.

    Args:
        student: copied at its present weights; parameters keep their order and names.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module: Any = copy.deepcopy(student).requires_grad_(False)
        if isinstance(self.module, Reducible):
            # targets are features of the whole image, also when the student drops tokens
            self.module.set_token_reduction()
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever is asked."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Moves every parameter towards the student's: teacher = momentum * teacher + (1 - momentum) * student."""
        theirs = [p.detach() for p in student.parameters()]
        torch._foreach_lerp_(list(self.module.parameters()), theirs, 1 - momentum)
        for mine, buffer in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(buffer)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cosine_momentum(progress: float, start: float, end: float) -> float:
    """Momentum that rises from `start` to `end` along half a cosine.

    Args:
        progress: share of the run that is done, 0..1 (values outside are clipped).
        start: momentum at 0.
        end: momentum at 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))


def check_grid(teacher: Teacher, config: TeacherConfig, grid: Grid, image_size: Grid) -> None:
    """Compares the teacher's token grid with the student's, before any training.

    Args:
        teacher: the teacher as built.
        config: its settings, for the message.
        grid: (h, w) of the student's tokens.
        image_size: (height, width) of the student's input.

    Raises:
        ConfigError: if the grids differ, with the size that would make them equal.
    """
    found = teacher.grid_for(*image_size)
    if found != grid:
        size = f"{teacher.image_size[0]}x{teacher.image_size[1]}"
        problem = (
            f"the teacher {config.model} at {size} gives {found[0]}x{found[1]} features, but the student has "
            f"{grid[0]}x{grid[1]} tokens"
        )
        raise ConfigError("objective.teacher.image_size", config.image_size, problem, "Set it to 0 to have it chosen.")
