"""What all pre-training tasks share: student, teacher, mask and loss behind one interface that the engine calls.

The interface itself is `itpn_core.task.Task`. Images are float in [0, 1]; the task normalises them for the student and
the teacher. Every random choice (mask, stochastic depth) derives from `keys_B`. Each sample masks the same number of
patches, so losses and gradients add up exactly over ranks and micro-batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from itpn_core.evaluation.features import feature_std, rankme
from itpn_core.models.config import ModelConfig
from itpn_core.models.trunk import StemFeatures
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.guard import CollapseGuard
from itpn_core.pretraining.masking import PUBLISHED_RATIO, Placement, block_mask, mask_count, uniform_mask
from itpn_core.pretraining.targets import map_of, plain_layer_norm
from itpn_core.pretraining.teachers import ImageNorm, Teacher, at_least_float32
from itpn_core.reduction.model import Reducible
from itpn_core.task import Examples, Task

PIXEL_MASK_RATIO = 0.75


def mask_ratio(config: ObjectiveConfig) -> float:
    """Share of masked patches of an objective: its own, else the published one."""
    return config.mask_ratio or (PIXEL_MASK_RATIO if config.kind == "pixel" else PUBLISHED_RATIO)


class PretrainTask(Task):
    """What all objectives share: the student, the mask, image normalisation, frozen features, state.

    Args:
        model: shape of the student.
        config: the objective.
        student: the model that is trained.
        teacher: frozen source of targets, or None. It is not part of the module's state, parameters or hooks.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, student: Any, teacher: Teacher | None) -> None:
        super().__init__(student)
        self.model_config = model
        self.config = config
        self.title = f"the {config.kind} objective"
        self.watched = config.kind == "ema"
        self.normalise = ImageNorm(config.mean, config.std)
        # In a tuple, so that torch does not register it: a frozen teacher must not reach the optimizer, DDP or the
        # checkpoints. `_apply` below keeps it on the student's device.
        self._outside = () if teacher is None else (teacher,)
        self._placement = Placement()
        self.guard = CollapseGuard(config.guard_fraction, config.guard_steps)
        self.mask_count = mask_count(student.grid[0] * student.grid[1], self._mask_ratio())
        if isinstance(student, Reducible):
            student.set_token_reduction(student.migration, student.gathering, masked_tokens=self.mask_count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in (*self._outside, super()):
            module._apply(fn, recurse)
        return self

    @property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, None for objectives that need none."""
        return self._outside[0] if self._outside else None

    def compilable(self) -> list[nn.Module]:
        """The teacher and the mask's inner loop."""
        return [self._placement, *self._outside]

    # --- mask ---

    def _mask_ratio(self) -> float:
        return mask_ratio(self.config)

    def mask(self, keys_B: Tensor) -> Tensor:
        """Masks of a batch: bool [B, N], the same count of True in every row."""
        kind = self.config.mask
        uniform = kind == "uniform" or (kind == "auto" and self.config.kind == "pixel")
        if uniform:
            return uniform_mask(keys_B, self.student.grid, self.mask_count)
        return block_mask(keys_B, self.student.grid, self.mask_count, self._placement)

    # --- what an objective defines ---

    @abstractmethod
    def targets(self, images_B3HW: Tensor) -> Any:
        """Targets of a batch, without gradient; passed on to `forward` unseen."""

    @torch.no_grad()
    def prepare(self, examples: Examples) -> tuple[Tensor, Any]:
        """The images as they are, and their targets; labels are not looked at."""
        return examples.images, self.targets(examples.images)

    @abstractmethod
    def picture(self, images_B3HW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Maps [B, C, h, w] for `figure`: targets and predictions, and features of single pyramid levels."""

    def _pair(self, images_B3HW: Tensor, prediction_BNT: Tensor) -> dict[str, Tensor]:
        """Maps of an objective with one target per patch."""
        grid = self.student.grid
        return {"teacher": map_of(self.targets(images_B3HW), grid), "student": map_of(prediction_BNT, grid)}

    # --- target statistics ---

    @property
    def needs_statistics(self) -> bool:
        """Whether `fit_target_statistics` must run before the first step of a new run."""
        return False

    def fit_target_statistics(self, batches: Iterable[Tensor]) -> None:
        """Takes the targets' channel statistics over a fixed list of images [B, 3, H, W] in [0, 1]."""
        del batches

    # --- frozen features ---

    @torch.no_grad()
    def _encoded(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, StemFeatures]:
        """Stage-3 tokens of whole images before and after the final norm, and the stem's laterals."""
        student, mode = self.student, self.training
        self.train(False)
        images_B3HW = self.normalise(images_B3HW)
        grid = student.grid_of(*images_B3HW.shape[-2:])
        stem = student.stem(student.embed(images_B3HW))
        x_BNE = student.attend(stem.tokens + student.positions(grid), grid).tokens
        normed_BNE = student.norm(x_BNE) if self.model_config.is_fast else plain_layer_norm(x_BNE)
        self.train(mode)
        return x_BNE, normed_BNE, stem

    def backbone_tokens(self, images_B3HW: Tensor) -> Tensor:
        """Stage-3 tokens [B, N, E] of whole images after the final norm (parameter-free in the iTPN flavours)."""
        return at_least_float32(self._encoded(images_B3HW)[1])

    def features(self, images_B3HW: Tensor) -> Tensor:
        """The backbone's features for k-NN and probes: [B, E], mean of `backbone_tokens`."""
        return self.backbone_tokens(images_B3HW).mean(dim=1)

    @torch.no_grad()
    def stage_features(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """The same per stage of the pyramid, from one pass: "" is `features`, "p16", "p8", "p4" means over cells."""
        x_BNE, normed_BNE, stem = self._encoded(images_B3HW)
        student, mode = self.student, self.training
        self.train(False)
        levels = student.levels(normed_BNE if self.model_config.is_fast else x_BNE, stem)
        self.train(mode)
        pooled = {name: at_least_float32(level).mean(dim=(1, 2)) for name, level in levels._asdict().items()}
        return {"": at_least_float32(normed_BNE).mean(dim=1), **pooled}

    def teacher_features(self, images_B3HW: Tensor) -> Tensor:
        """The teacher's features for the same evaluation: [B, C], mean over its map.

        Raises:
            ValueError: if the objective has no external teacher.
        """
        if self.teacher is None:
            raise ValueError(f"The objective {self.config.kind} has no external teacher.")
        return self.teacher(images_B3HW).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def health(self, images_B3HW: Tensor) -> dict[str, float]:
        """Spread and effective rank of the features of a fixed batch; waits for the device, so call it rarely.

        Returns:
            "std/<level>" and "rankme/<level>" per level.
        """
        report: dict[str, float] = {}
        for name, tokens_BNC in self.levels(images_B3HW).items():
            rows_ND = plain_layer_norm(tokens_BNC).flatten(0, 1)
            report[f"std/{name}"] = feature_std(rows_ND).item()
            report[f"rankme/{name}"] = rankme(rows_ND)
        return report

    def levels(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Features whose health is watched, by name: [B, cells, C]."""
        return {"x16": self.backbone_tokens(images_B3HW)}

    def watch(self, step: int, health: Mapping[str, float]) -> None:
        """Feeds the collapse guard with a `health` report.

        Raises:
            CollapseError: if a level has lost its spread for `guard_steps` steps.
        """
        self.guard.update(step, {k.removeprefix("std/"): v for k, v in health.items() if k.startswith("std/")})

    def figure(self, images_B3HW: Tensor, keys_B: Tensor) -> dict[str, Tensor]:
        """Tensors for a picture: what went in, what was hidden, what was asked and what was answered.

        Returns:
            "input" [B, 3, H, W] in [0, 1], "mask" float [B, 1, h, w], then float32 maps [B, C, h, w]: "teacher" and
            "student" (target and prediction), or one pair per pyramid level as "teacher/p8", "student/p8"; a
            "student/…" without its teacher shows the student's own features of that level.
        """
        mode = self.training
        self.train(False)
        mask_BN = self.mask(keys_B)
        with torch.no_grad():
            maps = self.picture(images_B3HW, mask_BN)
        self.train(mode)
        mask = map_of(mask_BN.unsqueeze(2).float(), self.student.grid)
        return {"input": images_B3HW, "mask": mask} | {name: value.float() for name, value in maps.items()}

    # --- state ---

    def persistent_state(self) -> dict[str, Tensor]:
        """All that must survive a restart, by name: weights, moving averages, statistics, guard."""
        state = super().persistent_state()
        for kind, values in self.guard.state().items():
            state |= {f"guard/{kind}/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        return state

    def load_persistent_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a `persistent_state`.

        Raises:
            WeightsError: if it belongs to another model or objective.
        """
        guard: dict[str, dict[str, float]] = {"first": {}, "low_since": {}}
        for name in [k for k in state if k.startswith("guard/")]:
            _, kind, level = name.split("/", 2)
            guard[kind][level] = state[name].item()
        super().load_persistent_state({k: v for k, v in state.items() if not k.startswith("guard/")})
        self.guard.load(guard)
