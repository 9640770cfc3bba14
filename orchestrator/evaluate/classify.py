"""Top-1 and top-5 of a classifier on the val split, and what it confuses."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itpn_core.evaluation import accuracy
from itpn_core.finetuning.task import ClassifyTask
from orchestrator.config.tree import FinetuneConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import EvalView
from orchestrator.evaluate.features import DAMAGED, Collected, collect, note_damaged, right_or_not
from orchestrator.track.confusion import confusion_figure
from orchestrator.train.context import RunContext
from orchestrator.train.precision import autocast_dtype

TOP = 5


@dataclass(frozen=True)
class ClassRow:
    """One class of the report."""

    name: str
    images: int
    top1: float
    """Share of its images that were recognised; nan without images."""
    precision: float
    """Share of the images taken for it that are it; nan when none was."""
    taken_for: str
    """The class its images are most often taken for instead; "" when all are right."""
    taken: int
    """How many of its images those are."""


class ClassifierEvaluator:
    """Classifies the val split on all ranks; keeps the last predictions for the report.

    Args:
        config: resolved configuration.
        run: surroundings of this rank.
        manifest: the data.
    """

    def __init__(self, config: FinetuneConfig, run: RunContext, manifest: Manifest) -> None:
        self._config = config
        self._run = run
        self._train = manifest.split(config.data.train_split)
        self._val = manifest.split(config.data.val_split)
        self._confusion_YY = torch.zeros(0, 0, dtype=torch.int64)

    def __call__(self, task: ClassifyTask, step: int, known: dict[str, list[int]]) -> dict[str, float]:
        """Evaluates; collective.

        Args:
            task: the classifier.
            step: 0 measures it before training.
            known: which images were right (indices), by what was measured; filled here.

        Returns:
            Metrics by name; the same on every rank.
        """
        found = self._predict(task)
        ranked_NK, labels_N = found.features.long(), found.labels
        right_NK = ranked_NK == labels_N[:, None]
        when = " before training" if step == 0 else ""
        note_damaged(known, found)
        known[f"top-1{when}"] = found.places[right_NK[:, 0]].tolist()
        if step:
            known["top-5"] = found.places[right_NK.any(dim=1)].tolist()
        classes = len(self._train.classes)
        pairs_N = labels_N * classes + ranked_NK[:, 0]
        self._confusion_YY = torch.bincount(pairs_N, minlength=classes * classes).view(classes, classes)
        return {"eval/top1": accuracy(right_NK[:, 0]).value, "eval/top5": accuracy(right_NK.any(dim=1)).value}

    def _predict(self, task: ClassifyTask) -> Collected:
        """The best classes of every image, best first, as its features."""
        config, run = self._config, self._run
        dtype = autocast_dtype(config.train.precision, run.device)
        best = min(TOP, task.classes)

        def extract(images_u8_B3HW: Tensor) -> Tensor:
            images = images_u8_B3HW.float() / 255
            if config.train.precision == "fp64":
                images = images.double()
            with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
                return task.logits(images).topk(best, dim=1).indices

        view = EvalView(config.data.image_size, config.eval.crop, config.eval.images)
        task.eval()
        try:
            return collect(extract, config.data, self._val, view, config.eval.batch, run.rank, run.world, run.device)
        finally:
            task.train()

    def files(self, step: int, directory: Path) -> list[Path]:
        """Confusion picture and per-class tables (CSV and Markdown) of the last evaluation."""
        rows = class_rows(self._confusion_YY, list(self._train.classes))
        picture = directory / "figures" / f"confusion-{step:08d}.png"
        confusion_figure(picture, self._confusion_YY, list(self._train.classes), step=step)
        tables = {".csv": class_csv(rows), ".md": class_markdown(rows, step)}
        paths = [picture]
        for suffix, text in tables.items():
            path = directory / "classes" / f"classes-{step:08d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            paths.append(path)
        return paths

    def summary(self, known: dict[str, list[int]]) -> dict[str, Any]:
        """Accuracies with standard errors and the protocol in words."""
        count = min(self._config.eval.images or self._val.samples, self._val.samples)
        found = {name: accuracy(right_N) for name, right_N in right_or_not(known, count).items()}
        scores = {name: (estimate.value, estimate.standard_error) for name, estimate in found.items()}
        damaged = len(known.get(DAMAGED, []))
        protocol = (
            f"{count - damaged} val images{f' ({damaged} damaged)' if damaged else ''},"
            f" {len(self._train.classes)} classes, {self._config.data.image_size} px,"
            f" centre crop {self._config.eval.crop:g}"
        )
        return {"scores": scores, "differences": [], "protocol": protocol}


def class_rows(confusion_YY: Tensor, names: list[str]) -> list[ClassRow]:
    """What happened to each class.

    Args:
        confusion_YY: int64, images by true class (row) and predicted class (column).
        names: of the classes.
    """
    rows = []
    taken_Y = confusion_YY.sum(dim=0).tolist()
    for label, name in enumerate(names):
        counts_Y = confusion_YY[label].clone()
        images, right = int(counts_Y.sum()), int(counts_Y[label])
        counts_Y[label] = 0
        other = int(counts_Y.argmax()) if images > right else -1
        rows.append(
            ClassRow(
                name=name,
                images=images,
                top1=right / images if images else float("nan"),
                precision=right / taken_Y[label] if taken_Y[label] else float("nan"),
                taken_for=names[other] if other >= 0 else "",
                taken=int(counts_Y[other]) if other >= 0 else 0,
            )
        )
    return rows


def class_csv(rows: list[ClassRow]) -> str:
    """The rows as comma-separated values, in class order."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class", "images", "top1", "precision", "most_often_taken_for", "so_often"])
    for row in rows:
        writer.writerow([row.name, row.images, f"{row.top1:.4f}", f"{row.precision:.4f}", row.taken_for, row.taken])
    return out.getvalue()


def class_markdown(rows: list[ClassRow], step: int) -> str:
    """The rows as a table, the worst class first."""
    lines = [
        f"# Classes at step {step}",
        "",
        "| class | images | top-1 | precision | most often taken for |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.top1):
        taken = f"{row.taken_for} ({row.taken})" if row.taken_for else ""
        lines.append(f"| {row.name} | {row.images} | {100 * row.top1:.1f} % | {100 * row.precision:.1f} % | {taken} |")
    return "\n".join(lines) + "\n"
