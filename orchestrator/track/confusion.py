"""The picture of what a classifier confuses."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor

_INK: Final = "#1b2733"
_DPI: Final = 110
_NAMED: Final = 40  # classes that still get their names on the axes
_WRITTEN: Final = 20  # classes whose shares are written into the cells


def confusion_figure(path: Path, counts_YY: Tensor, names: list[str], *, step: int) -> None:
    """Draws shares of each true class (row) by predicted class (column).

    Args:
        path: PNG to write; its folder is created.
        counts_YY: int64, images by true and predicted class.
        names: of the classes.
        step: optimizer step, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = counts_YY.double().numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    top1 = np.trace(counts) / max(counts.sum(), 1)
    classes = len(names)
    side = min(9.0, 3.2 + 0.34 * classes)
    figure = Figure(figsize=(side + 0.8, side), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # a square-root scale, so that rare confusions are seen beside the diagonal
    image = axes.imshow(np.sqrt(share), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_xlabel("predicted class", fontsize=8, color=_INK)
    axes.set_ylabel("true class", fontsize=8, color=_INK)
    if classes <= _NAMED:
        axes.set_xticks(range(classes), [name[:18] for name in names], rotation=90, fontsize=7)
        axes.set_yticks(range(classes), [name[:18] for name in names], fontsize=7)
    if classes <= _WRITTEN:
        for row, column in np.argwhere(share >= 0.005).tolist():
            colour = "white" if share[row, column] > 0.4 else _INK
            text = f"{100 * share[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.75)
    ticks = [0.0, 0.01, 0.05, 0.2, 0.5, 1.0]
    bar.set_ticks(np.sqrt(ticks).tolist(), labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.ax.tick_params(labelsize=7)
    title = f"share of each true class · step {step:,} · top-1 {top1:.2%}"
    axes.set_title(title, fontsize=10, weight="bold", color=_INK, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
