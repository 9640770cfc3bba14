"""Pictures for reviewers: small PNGs with the same images, colours and scales at every step.

Plain tensors in, a file out. matplotlib is imported when the first picture is drawn, and without its global state, so
drawing works in any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

F32 = npt.NDArray[np.float32]

Column = tuple[str, F32, dict[str, Any]]
"""Heading, one picture per row, options of the drawing."""

_CELL: Final = 1.25  # inches per image
_DPI: Final = 110
_INK: Final = "#1b2733"
_HIDDEN: Final = np.array([0.11, 0.15, 0.20], dtype=np.float32)
_LINES: Final = ("#1f6fb4", "#d1603d", "#3a8f5c", "#8a5fb0", "#b08a1e", "#5b6b7a")


def _array(tensor: Tensor) -> F32:
    return tensor.detach().to("cpu", torch.float32).numpy()


@dataclass(frozen=True)
class ColourBasis:
    """Three principal directions of one feature space, as red, green and blue.

    The signs are fixed (the largest loading of each direction is positive) and the range is that of the features it was
    fitted on, so equal features have equal colours in every picture made with the same basis.

    Attributes:
        mean: [C], centre of the features.
        axes: [C, 3], the directions.
        low: [3], projection that is black (2nd percentile).
        high: [3], projection that is full colour (98th percentile).
    """

    mean: F32
    axes: F32
    low: F32
    high: F32

    @classmethod
    def fit(cls, features_BChw: Tensor) -> ColourBasis:
        """The basis of a set of feature maps [B, C, h, w]; C may be less than three."""
        rows_NC = _array(features_BChw.movedim(1, -1).flatten(0, 2)).astype(np.float64)
        mean_C = rows_NC.mean(0)
        _, axes_CC = np.linalg.eigh(np.cov(rows_NC - mean_C, rowvar=False).reshape(rows_NC.shape[1], -1))
        axes_C3 = axes_CC[:, ::-1][:, :3]
        strongest = np.abs(axes_C3).argmax(0)
        axes_C3 = axes_C3 * np.where(axes_C3[strongest, np.arange(axes_C3.shape[1])] < 0, -1.0, 1.0)
        axes_C3 = np.pad(axes_C3, ((0, 0), (0, 3 - axes_C3.shape[1])))
        low_3, high_3 = np.percentile((rows_NC - mean_C) @ axes_C3, (2, 98), axis=0)
        return cls(*(part.astype(np.float32) for part in (mean_C, axes_C3, low_3, np.maximum(high_3, low_3 + 1e-6))))

    def colours(self, features_BChw: Tensor) -> F32:
        """RGB in [0, 1], [B, h, w, 3]."""
        rows_BhwC = _array(features_BChw.movedim(1, -1))
        projected = (rows_BhwC - self.mean) @ self.axes
        return np.clip((projected - self.low) / (self.high - self.low), 0, 1).astype(np.float32)


def _level(key: str) -> str:
    return key.partition("/")[2]


def _columns(parts: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor | None]]:
    """Pairs of teacher and student maps by level: (level, teacher map, student map)."""
    return [
        (_level(key), value, parts.get(key.replace("teacher", "student", 1)))
        for key, value in parts.items()
        if key.startswith("teacher")
    ]


def feature_figure(
    path: Path,
    parts: Mapping[str, Tensor],
    *,
    step: int,
    title: str = "",
    basis: Mapping[str, ColourBasis] | None = None,
) -> dict[str, ColourBasis]:
    """Input, mask, and the features of teacher and student in the teacher's colours; one image per row.

    Args:
        path: PNG to write; its folder is created.
        parts: what `PretrainTask.figure` gives: "input" [B,3,H,W] in [0,1], "mask" [B,1,h,w] (1 = masked), "teacher"
            and "student" [B,C,h,w]; more levels as "teacher/p8", "student/p8"; a student's level may stand alone.
        step: optimiser step, shown in the title.
        title: run name, shown in the title.
        basis: colours of an earlier picture of the same run; without it they are fitted to these teacher features.

    Returns:
        The colours used, by level, to be handed to the next picture (a moving teacher would shift them otherwise).
    """
    images, mask = _array(parts["input"]).transpose(0, 2, 3, 1), _array(parts["mask"])[:, 0]
    used: dict[str, ColourBasis] = dict(basis or {})
    columns: list[Column] = [
        ("input", np.clip(images, 0, 1), {}),
        (f"visible to the student\n({mask.mean():.0%} masked)", _masked(images, mask), {}),
    ]
    for level, teacher, student in _columns(parts):
        used.setdefault(level, ColourBasis.fit(teacher))
        place = f" ({level})" if level else ""
        columns.append((f"teacher{place}\nfeatures, PCA", used[level].colours(teacher), {}))
        if student is None:
            continue
        same = student.shape == teacher.shape
        columns.append((
            f"student{place}\n{'prediction, same PCA' if same else 'features, own PCA'}",
            (used[level] if same else ColourBasis.fit(student)).colours(student),
            {},
        ))  # fmt: skip
        if same:
            agreement = torch.nn.functional.cosine_similarity(teacher.float(), student.float(), dim=1)
            columns.append((
                f"agreement{place}\ncosine 0 to 1, mean {agreement.mean():.2f}",
                _array(agreement),
                {"vmin": 0.0, "vmax": 1.0, "cmap": "viridis"},
            ))  # fmt: skip
    for key in [k for k in parts if k.startswith("student/") and k.replace("student", "teacher", 1) not in parts]:
        used.setdefault(key, ColourBasis.fit(parts[key]))
        columns.append((f"student ({_level(key)})\nfeatures, own PCA", used[key].colours(parts[key]), {}))
    _grid(path, columns, f"{title + ' · ' if title else ''}step {step:,}")
    return used


def _masked(images_BHW3: F32, mask_Bhw: F32) -> F32:
    """Images with the masked patches painted over."""
    height, width = images_BHW3.shape[1:3]
    rows = np.arange(height) * mask_Bhw.shape[1] // height
    columns = np.arange(width) * mask_Bhw.shape[2] // width
    wide = mask_Bhw[:, rows][:, :, columns][..., None] > 0.5
    return np.where(wide, _HIDDEN, np.clip(images_BHW3, 0, 1))


def neighbour_figure(
    path: Path, queries_B3HW: Tensor, found_BK3HW: Tensor, similar_BK: Tensor, correct_BK: Tensor | None, *, step: int
) -> None:
    """Queries and their nearest neighbours; the frame says whether the label agrees.

    Args:
        path: PNG to write.
        queries_B3HW: query images in [0, 1].
        found_BK3HW: their nearest images of the bank, the nearest first.
        similar_BK: cosine similarity of each.
        correct_BK: whether each has the query's label; None where there are no labels.
        step: optimiser step.
    """
    found, similar = _array(found_BK3HW).transpose(0, 1, 3, 4, 2), _array(similar_BK)
    right = None if correct_BK is None else correct_BK.bool().cpu().numpy()
    columns: list[Column] = [("query", _array(queries_B3HW).transpose(0, 2, 3, 1), {})]
    columns += [(f"neighbour {rank + 1}", found[:, rank], {}) for rank in range(found.shape[1])]

    def mark(row: int, column: int, axes: Any) -> None:
        if column == 0:
            return
        colour = _INK if right is None else ("#2e8b57" if right[row, column - 1] else "#c0392b")
        for side in axes.spines.values():
            side.set(visible=True, color=colour, linewidth=2.5)
        axes.set_xlabel(f"{similar[row, column - 1]:.2f}", fontsize=7, color=colour, labelpad=2.5)

    share = "" if right is None else f" · {right.mean():.0%} share the label (green)"
    _grid(path, columns, f"nearest neighbours · step {step:,}{share}", mark)


def _grid(
    path: Path,
    columns: Sequence[Column],
    title: str,
    mark: Callable[[int, int, Any], None] | None = None,
) -> None:
    """Columns of small images under their headings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, head = len(columns[0][1]), 0.62
    below = 0.2 if mark else 0.06  # inches under each image; a marked one has a line of text there
    cell = _CELL * columns[0][1][0].shape[0] / columns[0][1][0].shape[1]
    height = (cell + below) * rows + head
    figure = Figure(figsize=((_CELL + 0.06) * len(columns), height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=below / height, top=1 - head / height)
    figure.subplots_adjust(wspace=0.06 / _CELL, hspace=below / cell)
    for column, (heading, pictures, options) in enumerate(columns):
        for row in range(rows):
            axes = grid[row][column]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.imshow(pictures[row], interpolation="nearest", aspect="auto", **options)
            if mark:
                mark(row, column, axes)
        grid[0][column].set_title(heading, fontsize=7.5, color=_INK, pad=4)
    figure.text(0.012, 1 - 0.08 / height, title, fontsize=10, weight="bold", color=_INK, va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def curve_figure(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str, unit: str = "") -> None:
    """Curves over steps, for example the loss of each level; the end of each curve carries its name and value.

    Args:
        path: PNG to write.
        curves: (step, value) points by name.
        title: heading.
        unit: what the values are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True) if points else ((), ())
        label = f"{name}  {values[-1]:.4g}" if values else f"{name}  (nothing)"
        axes.plot(steps, values, color=_LINES[number % len(_LINES)], linewidth=1.4, label=label)
    axes.set_title(title, fontsize=10, weight="bold", color=_INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=_INK)
    axes.set_ylabel(unit, fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ec", linewidth=0.7)
    if curves:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
