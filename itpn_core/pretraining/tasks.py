"""Builds the pre-training task that a configuration asks for."""

from __future__ import annotations

from itpn_core.errors import ConfigError
from itpn_core.models.clip_student import ClipStudent
from itpn_core.models.config import ModelConfig
from itpn_core.models.fast_student import FastStudent
from itpn_core.models.pixel_student import PixelStudent
from itpn_core.pretraining.base import PretrainTask
from itpn_core.pretraining.config import ObjectiveConfig, check_objective
from itpn_core.pretraining.ema import EmaTask
from itpn_core.pretraining.supervised import ClipTask, FastTask, PixelTask
from itpn_core.pretraining.teachers import Grid, Teacher, TimmTeacher, check_grid
from itpn_core.task import TaskOutput

__all__ = ["FAMILY_OF", "TAUGHT", "PretrainTask", "TaskOutput", "build_task"]

FAMILY_OF = {"fast": "fast", "ema": "fast", "clip": "itpn_clip", "pixel": "itpn_pixel"}
"""The model family each objective trains."""
TAUGHT = ("fast", "clip")
"""Objectives with a frozen teacher."""


def _teacher_for(config: ObjectiveConfig, grid: Grid, image_size: Grid) -> TimmTeacher:
    teacher = TimmTeacher(config.teacher, grid)
    check_grid(teacher, config.teacher, grid, image_size)
    return teacher


def build_task(
    model: ModelConfig, config: ObjectiveConfig, image_size: Grid | None = None, teacher: Teacher | None = None
) -> PretrainTask:
    """Builds student, teacher and objective; everything that can be wrong is found here, before training.

    Weights are drawn from torch's default generator: seed it to make a run's initialisation reproducible.

    Args:
        model: shape of the student.
        config: the objective.
        image_size: (height, width) of the student's images when not `model.img_size` squared.
        teacher: an own teacher instead of the configured timm model (objectives fast and clip).

    Raises:
        ConfigError: if settings do not fit together, naming the key.
        WeightsError: if the teacher's weights cannot be used.
    """
    check_objective(config)
    family = FAMILY_OF[config.kind]
    if model.family != family:
        raise ConfigError("model.family", model.family, f"must be {family} when objective.kind is {config.kind}")
    size = image_size or (model.img_size, model.img_size)
    if config.kind == "ema":
        return EmaTask(model, config, size)
    if config.kind == "pixel":
        decoder = {
            "decoder_dim": config.decoder_dim,
            "decoder_depth": config.decoder_depth,
            "decoder_heads": config.decoder_heads,
        }
        return PixelTask(model, config, PixelStudent(model, config.pyramid_dim, img_size=size, **decoder), None)
    grid = (size[0] // model.patch_size, size[1] // model.patch_size)
    teacher = teacher or _teacher_for(config, grid, size)
    if config.kind == "clip":
        clip = ClipStudent(model, teacher.width, config.pyramid_dim, mask_laterals=config.mask_laterals, img_size=size)
        return ClipTask(model, config, clip, teacher)
    scale = config.stem_gradient_scale
    fast = FastStudent(model, teacher.width, config.pyramid_dim, stem_gradient_scale=scale, img_size=size)
    return FastTask(model, config, fast, teacher)
