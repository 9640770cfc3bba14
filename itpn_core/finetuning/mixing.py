"""Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of neighbours in the global batch.

Slots 2i and 2i+1 of the global batch are a pair: each gets the other's pixels and label, by one draw that derives from
the key of slot 2i. So the result is a function of the batch's content alone, however it is cut into ranks and
micro-batches, as long as both of a pair are at hand. The last slot of an odd batch stays as it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.finetuning.config import FinetuneTaskConfig
from itpn_core.random import derive, uniform

_QUANTILES = 4097
_GRID = 1 << 16


class Mixed(NamedTuple):
    """Images and labels after mixing.

    Attributes:
        images: [B, C, H, W] in the dtype of the input.
        targets: [B, Y], each row sums to 1.
    """

    images: Tensor
    targets: Tensor


class _Plan(NamedTuple):
    """What happens to each sample; both of a pair have equal entries."""

    keep_B: Tensor  # noqa: N815
    """Weight of the sample itself, 1 = unmixed."""
    cut_B: Tensor  # noqa: N815
    """True where a box is exchanged instead of blending."""
    box_B4: Tensor  # noqa: N815
    """Rows [top, bottom) and columns [left, right) of the box."""


def soft_labels(labels_B: Tensor, classes: int, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels as distributions [B, Y]: `smoothing` spread over all classes, the rest on the label.

    Holes (label -1) count as class 0; the caller gives them no weight.
    """
    one_hot_BY = F.one_hot(labels_B.clamp(min=0), classes).to(dtype)
    return one_hot_BY * (1 - smoothing) + smoothing / classes


def mix_pairs(
    images_BCHW: Tensor, targets_BY: Tensor, keys_B: Tensor, valid_B: Tensor, config: FinetuneTaskConfig
) -> Mixed:
    """Mixes neighbours.

    Args:
        images_BCHW: float images of consecutive slots of a global batch, the first of an even slot.
        targets_BY: their labels as distributions.
        keys_B: int64 [B], one key per sample and epoch.
        valid_B: bool [B]; a sample whose partner could not be read stays as it is.
        config: how much, how often.

    Returns:
        Images and labels of the same shapes; label and pixels of a sample have the same share of the partner.
    """
    count = len(images_BCHW)
    if count < 2 or not config.mixes:
        return Mixed(images_BCHW, targets_BY)
    slots_B = torch.arange(count, device=images_BCHW.device)
    partner_B = slots_B ^ 1
    partner_B = torch.where(partner_B < count, partner_B, slots_B)
    paired_B = (partner_B != slots_B) & valid_B & valid_B[partner_B]
    height, width = images_BCHW.shape[-2:]
    plan = _plan(derive(keys_B, "mix")[slots_B & ~1], (height, width), config)
    keep_B = torch.where(paired_B, plan.keep_B, 1.0)
    partners_BCHW = images_BCHW[partner_B]
    top_B, bottom_B, left_B, right_B = (edge[:, None] for edge in plan.box_B4.unbind(1))
    rows_H, columns_W = (torch.arange(n, device=images_BCHW.device) for n in (height, width))
    inside_BHW = (
        (((rows_H >= top_B) & (rows_H < bottom_B))[:, :, None])
        & (((columns_W >= left_B) & (columns_W < right_B))[:, None, :])
    )
    cut_B = paired_B & plan.cut_B
    own_BHW = torch.where(cut_B[:, None, None], (~inside_BHW).to(keep_B.dtype), keep_B[:, None, None])
    own_B1HW = own_BHW[:, None].to(images_BCHW.dtype)
    share_B1 = keep_B[:, None].to(targets_BY.dtype)
    return Mixed(
        images_BCHW * own_B1HW + partners_BCHW * (1 - own_B1HW),
        targets_BY * share_B1 + targets_BY[partner_B] * (1 - share_B1),
    )


def _plan(keys_B: Tensor, size: tuple[int, int], config: FinetuneTaskConfig) -> _Plan:
    draws_B5 = uniform(keys_B, 5)
    mixed_B = draws_B5[:, 0] < config.mix_share
    share = config.cutmix_share if config.mixup > 0 and config.cutmix > 0 else float(config.cutmix > 0)
    cut_B = mixed_B & (draws_B5[:, 1] < share)
    blend_B = _beta(draws_B5[:, 2], config.mixup) if config.mixup > 0 else torch.ones_like(draws_B5[:, 2])
    box_B4, uncut_B = _boxes(draws_B5[:, 2:], size, config.cutmix)
    keep_B = torch.where(mixed_B, torch.where(cut_B, uncut_B, blend_B), 1.0)
    return _Plan(keep_B, cut_B, box_B4)


def _boxes(draws_B3: Tensor, size: tuple[int, int], alpha: float) -> tuple[Tensor, Tensor]:
    """Boxes [B, 4] of the drawn area around a uniform centre, cut at the border, and the share that is left outside."""
    height, width = size
    keep_B = _beta(draws_B3[:, 0], alpha) if alpha > 0 else torch.ones_like(draws_B3[:, 0])
    side_B = (1 - keep_B).sqrt()
    edges = []
    for extent, draw_B in ((height, draws_B3[:, 1]), (width, draws_B3[:, 2])):
        centre_B, half_B = (draw_B * extent).floor(), (side_B * extent / 2).floor()
        edges += [(centre_B - half_B).clamp(0, extent), (centre_B + half_B).clamp(0, extent)]
    box_B4 = torch.stack(edges, dim=1)
    top_B, bottom_B, left_B, right_B = box_B4.unbind(1)
    return box_B4, 1 - (bottom_B - top_B) * (right_B - left_B) / (height * width)


def _beta(draws_B: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) numbers from uniform ones, through the quantile function."""
    if alpha == 1:
        return draws_B
    table_Q = _table(alpha, draws_B.device)
    place_B = draws_B * (_QUANTILES - 1)
    low_B = place_B.floor().long()
    return torch.lerp(table_Q[low_B], table_Q[low_B + 1], place_B - low_B)


@lru_cache(maxsize=8)
def _table(alpha: float, device: torch.device) -> Tensor:
    """The quantiles on the device; copied once, as a copy from host memory would wait in every step."""
    return torch.from_numpy(beta_quantiles(alpha)).to(device)


def beta_quantiles(alpha: float) -> npt.NDArray[np.float32]:
    """Quantiles of Beta(alpha, alpha) at 0, 1/4096 ... 1.

    With x = sin(t)^2 the density becomes proportional to (sin t * cos t)^(2 alpha - 1), whose integral over a fine grid
    of t is inverted. Between two quantiles the caller interpolates linearly.
    """
    t = (np.arange(_GRID) + 0.5) * (np.pi / 2 / _GRID)
    density = np.exp((2 * alpha - 1) * (np.log(np.sin(t)) + np.log(np.cos(t))))
    mass = np.concatenate([[0.0], np.cumsum(density)])
    edges = np.sin(np.arange(_GRID + 1) * (np.pi / 2 / _GRID)) ** 2
    quantiles: npt.NDArray[np.float32] = np.interp(np.linspace(0, mass[-1], _QUANTILES), mass, edges).astype(np.float32)
    return quantiles
