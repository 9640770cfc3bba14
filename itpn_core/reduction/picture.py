"""What a reduction did to images, as arrays: when each token was dropped, and an overlay in colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itpn_core.reduction.layout import Grid

if TYPE_CHECKING:
    from itpn_core.models.backbone import Backbone

KEPT = -1
# one per drop, told apart also in grey: blue, orange, green, violet (then again)
LAYER_COLOURS = ((0.12, 0.44, 0.71), (0.93, 0.55, 0.17), (0.23, 0.63, 0.38), (0.60, 0.35, 0.71))
_LINE_COLOUR = (1.0, 1.0, 1.0)
_TINT = 0.8
# how bright a tint is over black: dark parts must show it too
_FLOOR = 0.65


@dataclass(frozen=True)
class Observation:
    """What happened to the tokens of some images.

    Attributes:
        dropped: int64 [B, rows, columns], the layer before which each token was dropped; `KEPT` for survivors.
        layers: the layers that dropped tokens, in order.
        window: (rows, columns) of the attention windows in cells; None with global attention.
    """

    dropped: Tensor
    layers: tuple[int, ...]
    window: Grid | None


@torch.no_grad()
def observe(model: Backbone, images_B3HW: Tensor) -> Observation:
    """Runs a model under its current settings and notes which tokens it dropped where.

    Args:
        model: a backbone after `set_token_reduction`.
        images_B3HW: normalised images, any size the model takes.
    """
    rows, cols = grid = model.grid_of(*images_B3HW.shape[-2:])
    out, _ = model.attended(images_B3HW)
    dropped_BN = torch.full((len(images_B3HW), rows * cols), KEPT, device=images_B3HW.device)
    before_BN = torch.ones_like(dropped_BN, dtype=torch.bool)
    for layer, cells_BK in out.history:
        # pads of windows (-1) are noted in a spare cell
        alive = torch.zeros(len(dropped_BN), rows * cols + 1, dtype=torch.bool, device=dropped_BN.device)
        alive_BN = alive.scatter(1, torch.where(cells_BK < 0, rows * cols, cells_BK), True)[:, :-1]
        dropped_BN = torch.where(before_BN & ~alive_BN, layer, dropped_BN)
        before_BN = alive_BN
    side = model.gathering.window
    window = (min(side, rows), min(side, cols)) if side else None
    return Observation(dropped_BN.view(-1, *grid).cpu(), tuple(layer for layer, _ in out.history), window)


def overlay(images_B3HW: Tensor, seen: Observation) -> Tensor:
    """The images with dropped tokens tinted by the layer that dropped them, and window borders drawn.

    Args:
        images_B3HW: the same images in [0, 1], not normalised.
        seen: what `observe` returned for them.

    Returns:
        float32 [B, H, W, 3] in [0, 1] on the CPU.
    """
    picture = images_B3HW.detach().cpu().float().clamp(0, 1).permute(0, 2, 3, 1).clone()
    height, width = picture.shape[1:3]
    rows, cols = seen.dropped.shape[1:]
    high, wide = height // rows, width // cols
    layer_BHW = seen.dropped.repeat_interleave(high, 1).repeat_interleave(wide, 2)
    grey = picture.mean(-1, keepdim=True)
    for index, layer in enumerate(seen.layers):
        colour = torch.tensor(LAYER_COLOURS[index % len(LAYER_COLOURS)])
        # the image stays readable as brightness of the tint
        tinted = _TINT * colour * (_FLOOR + (1 - _FLOOR) * grey) + (1 - _TINT) * grey
        picture = torch.where((layer_BHW == layer).unsqueeze(-1), tinted, picture)
    if seen.window is not None:
        line = torch.tensor(_LINE_COLOUR)
        thick = max(1, high // 12)
        for row in range(seen.window[0], rows, seen.window[0]):
            picture[:, row * high - thick : row * high + thick] = line
        for col in range(seen.window[1], cols, seen.window[1]):
            picture[:, :, col * wide - thick : col * wide + thick] = line
    return picture
