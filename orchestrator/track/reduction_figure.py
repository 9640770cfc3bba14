"""The picture of token reduction: images beside what was kept, what was dropped where, and the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from torch import Tensor

from itpn_core.models import Backbone
from itpn_core.reduction.picture import KEPT, LAYER_COLOURS, observe, overlay

_INCHES: Final = 2.6
_DPI: Final = 110
_CELL: Final = 16


def draw_reduction(model: Backbone, images_B3HW: Tensor, normalised_B3HW: Tensor, path: Path) -> Path:
    """Draws what a model's current settings do to images.

    Args:
        model: a backbone after `set_token_reduction`.
        images_B3HW: images in [0, 1].
        normalised_B3HW: the same images as the model takes them.
        path: PNG to write.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    seen = observe(model, normalised_B3HW)
    # cells of a few pixels would vanish under the lines of the windows
    times = -(-_CELL * seen.dropped.shape[1] // images_B3HW.shape[2])
    tinted = overlay(images_B3HW.repeat_interleave(times, 2).repeat_interleave(times, 3), seen)
    plain = images_B3HW.detach().cpu().float().clamp(0, 1).permute(0, 2, 3, 1)
    count = len(plain)
    figure = Figure(figsize=(_INCHES * count, 2 * _INCHES + 0.7), dpi=_DPI, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        kept = float((seen.dropped[column] == KEPT).float().mean())
        axes[0, column].imshow(plain[column].numpy())
        axes[1, column].imshow(tinted[column].numpy())
        axes[1, column].set_xlabel(f"{kept:.0%} of tokens reach the end", fontsize=8)
        for axis in axes[:, column]:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("tokens", fontsize=9)
    handles = [Patch(facecolor="white", edgecolor="0.3", label="kept (image shows)")]
    for index, layer in enumerate(seen.layers):
        colour = LAYER_COLOURS[index % len(LAYER_COLOURS)]
        handles.append(Patch(facecolor=colour, label=f"dropped before layer {layer}"))
    if seen.window is not None:
        label = f"windows {seen.window[0]}x{seen.window[1]}, {model.gathering.tokens} gathering tokens"
        handles.append(Patch(facecolor="0.92", edgecolor="0.6", label=f"white lines: {label}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
