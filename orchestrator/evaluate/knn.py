"""k-NN of frozen features by one fixed protocol, for the student and for what it must beat.

Protocol: the bank is `eval.bank` images at equal distances over the train split, the queries are the val split (or its
`eval.queries` images at equal distances); resize and centre crop, no augmentation; cosine similarity, `eval.k`
neighbours, votes weighted by similarity. Student and teacher features are the mean over positions of the feature map
(the student's after its final norm); raw pixels are the grey values at `eval.raw_size`, plain or centred per image,
whichever is better. With `eval.stages` the same bank and queries, from the same pass, also give k-NN, a linear probe
and RankMe of every pyramid stage (the mean over its cells), and a probe of the backbone's features. A stage's k-NN has
`eval.stage_images` of the queries, a probe so many of the bank, which keeps both cheap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from itpn_core.evaluation import (
    accuracy,
    feature_std,
    knn_classify,
    linear_probe,
    paired_difference,
    rankme,
    raw_pixel_features,
)
from itpn_core.pretraining.base import PretrainTask
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.config import DataConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import EvalView
from orchestrator.evaluate.features import DAMAGED, Collected, Extract, collect, note_damaged, right_or_not
from orchestrator.evaluate.neighbours import Measured
from orchestrator.train.context import RunContext
from orchestrator.train.precision import autocast_dtype

_RANKED = 2048
PROBE_BANK = 20
"""Least bank of a linear probe, which holds a tenth of it out."""


class Evaluator:
    """Measures a task's student, and once its baselines; remembers who was right for paired comparisons."""

    def __init__(self, config: PretrainConfig, run: RunContext, manifest: Manifest) -> None:
        self._config = config
        self._run = run
        self._train = manifest.split(config.data.train_split)
        self._val = manifest.split(config.data.val_split)
        self.measured: Measured | None = None
        """Features of the student's last evaluation, on rank 0."""

    def __call__(self, task: PretrainTask, step: int, known: dict[str, list[int]]) -> dict[str, float]:
        """Evaluates; collective.

        Args:
            task: student and teacher.
            step: 0 measures the untrained student and, when asked, the baselines.
            known: which queries earlier measurements got right (indices), by name; filled here.

        Returns:
            Metrics by name; the same on every rank.
        """
        task.eval()
        try:
            metrics = self._student(task, "untrained" if step == 0 else "trained", known)
            if step == 0 and self._config.eval.baselines:
                metrics |= self._baselines(task, known)
        finally:
            task.train()
        return metrics

    def _student(self, task: PretrainTask, name: str, known: dict[str, list[int]]) -> dict[str, float]:
        widths: dict[str, int] = {}
        extract = self._in_precision(task.features if not self._config.eval.stages else _side_by_side(task, widths))
        bank, query = self._features(extract, self._config.data)
        bank_ND, bank_N, query_MD, query_M = *bank[:2], *query[:2]
        note_damaged(known, query)
        banks, queries = _apart(bank_ND, widths), _apart(query_MD, widths)
        stages = {stage: (banks[stage], bank_N, queries[stage], query_M) for stage in banks}
        features = stages.pop("")
        self.measured = None if self._run.rank else Measured(*features, bank.places, query.places)
        correct_M = self._correct(*features)
        known[name] = query.places[correct_M].tolist()
        found = {
            "eval/knn_top1": accuracy(correct_M).value,
            "eval/rankme": rankme(features[0][:_RANKED]),
            "eval/feature_std": float(feature_std(features[0])),
        }
        if self._config.eval.stages:
            found |= self._probe("eval/", *features)
        some_Q = _spread(len(query_M), self._config.eval.stage_images)
        for stage, measured in stages.items():
            bank_NF, _, query_MF, _ = measured
            correct_Q = self._correct(bank_NF, bank_N, query_MF[some_Q], query_M[some_Q])
            found[f"eval/{stage}/knn_top1"] = accuracy(correct_Q).value
            found[f"eval/{stage}/rankme"] = rankme(bank_NF[:_RANKED])
            found |= self._probe(f"eval/{stage}/", *measured)
        return found

    def _probe(
        self, prefix: str, bank_ND: Tensor, bank_N: Tensor, query_MD: Tensor, query_M: Tensor
    ) -> dict[str, float]:
        device, some_R = self._run.device, _spread(len(bank_ND), self._config.eval.stage_images)
        if len(some_R) < PROBE_BANK:
            return {}
        with torch.enable_grad():
            probe = linear_probe(bank_ND[some_R].to(device), bank_N[some_R].to(device), query_MD.to(device))
        return {f"{prefix}linear_top1": accuracy(probe.predictions.cpu() == query_M).value}

    def _baselines(self, task: PretrainTask, known: dict[str, list[int]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        raw = replace(self._config.data, image_size=self._config.eval.raw_size)
        found = [self._baseline(_raw(centred), raw) for centred in (False, True)]
        metrics["eval/knn_top1_raw_pixels"], known["raw pixels"] = max(found, key=lambda pair: pair[0])
        if task.teacher is not None:
            teacher = self._baseline(self._in_precision(task.teacher_features), self._config.data)
            metrics["eval/knn_top1_teacher"], known["teacher"] = teacher
        return metrics

    def _baseline(self, extract: Extract, data: DataConfig) -> tuple[float, list[int]]:
        """Accuracy, and the places of the queries that were right."""
        bank, query = self._features(extract, data)
        correct_M = self._correct(*bank[:2], *query[:2])
        return accuracy(correct_M).value, query.places[correct_M].tolist()

    def _in_precision(self, extract: Extract) -> Extract:
        dtype = autocast_dtype(self._config.train.precision, self._run.device)

        def run(images_u8_B3HW: Tensor) -> Tensor:
            images = images_u8_B3HW.float() / 255
            if self._config.train.precision == "fp64":
                images = images.double()
            with torch.autocast(self._run.device.type, dtype, enabled=dtype is not None):
                return extract(images)

        return run

    def _features(self, extract: Extract, data: DataConfig) -> tuple[Collected, Collected]:
        """Of bank and queries."""
        config, run = self._config.eval, self._run
        bank = EvalView(data.image_size, config.crop, config.bank)
        query = EvalView(data.image_size, config.crop, config.queries)
        place = (config.batch, run.rank, run.world, run.device)
        return collect(extract, data, self._train, bank, *place), collect(extract, data, self._val, query, *place)

    def _correct(self, bank_ND: Tensor, bank_N: Tensor, query_MD: Tensor, query_M: Tensor) -> Tensor:
        """Which queries k-NN answers rightly: bool [M]."""
        device = self._run.device
        predicted = knn_classify(
            bank_ND.to(device), bank_N.to(device), query_MD.to(device), k=self._config.eval.k,
            classes=len(self._train.classes),
        )  # fmt: skip
        return predicted.cpu() == query_M

    def summary(self, known: dict[str, list[int]]) -> dict[str, Any]:
        """Accuracies with standard errors, paired differences of the trained student, and the protocol in words."""
        queries = self._config.eval.queries or self._val.samples
        correct = right_or_not(known, queries)
        damaged = len(known.get(DAMAGED, []))
        knn = {f"k-NN {name}": (accuracy(c).value, accuracy(c).standard_error) for name, c in correct.items()}
        differences = []
        for other in ("untrained", "raw pixels", "teacher"):
            if "trained" in correct and other in correct:
                gain = paired_difference(correct["trained"], correct[other])
                differences.append(
                    f"trained - {other}: {100 * gain.value:+.2f} points"
                    f" (standard error of the paired difference {100 * gain.standard_error:.2f})"
                )
        protocol = (
            f"cosine k-NN, k={self._config.eval.k}, similarity-weighted vote,"
            f" bank {self._config.eval.bank} of {self._train.samples} train images,"
            f" {queries - damaged} val queries{f' ({damaged} damaged)' if damaged else ''}"
        )
        return {"scores": knn, "differences": differences, "protocol": protocol}


def _side_by_side(task: PretrainTask, widths: dict[str, int]) -> Extract:
    """Features of all stages in one row [B, sum of widths]; `widths` is filled with what is where."""

    def extract(images_B3HW: Tensor) -> Tensor:
        parts = task.stage_features(images_B3HW)
        widths.update({stage: part.shape[1] for stage, part in parts.items()})
        return torch.cat(list(parts.values()), dim=1)

    return extract


def _apart(rows_ND: Tensor, widths: dict[str, int]) -> dict[str, Tensor]:
    """What `_side_by_side` has put into a row, by stage."""
    if not widths:
        return {"": rows_ND}
    parts = torch.split(rows_ND, list(widths.values()), dim=1)
    return {stage: part.contiguous() for stage, part in zip(widths, parts, strict=True)}


def _spread(count: int, wanted: int) -> Tensor:
    """Rows at equal distances: `wanted` of `count`, or all."""
    return torch.linspace(0, count - 1, min(wanted or count, count)).round().long()


def _raw(centred: bool) -> Extract:
    def extract(images_u8_B3HW: Tensor) -> Tensor:
        return raw_pixel_features(images_u8_B3HW.float().mean(dim=1, keepdim=True), centred)

    return extract
