"""Which patches the student does not see: block-wise and uniform masks, exact in count and seeded per sample.

Both generators are pure functions of `int64 [B]` keys (`itpn_core.random`), so a sample's mask depends on the run's
seed, the epoch and the sample alone. True means masked.

The block mask is our definition. The published generator masks a varying number of patches (65% of images reach the
nominal 75 of 196) and on small grids leaves images without any mask. Here every image masks exactly `count` cells,
which also makes every later shape static:

1. Up to `TRIES` rectangles are drawn per image: aspect log-uniform in [0.3, 1/0.3], area uniform in
   [min(max(1, round(16/196 N)), cells left), cells left], position uniform. A rectangle that does not fit into the
   grid, adds nothing, or would exceed the count is skipped; after 10 skips in a row no more are tried.
2. What is still missing is taken from the cells around the mask, nearest first (Manhattan distance), in seeded order
   among equals. A mask that is still empty starts at the first cell in seeded order.

Arithmetic is integer, or float64 with correctly rounded operations only, so devices and the plain twin in the tests
give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from itpn_core.constants import constant
from itpn_core.errors import ConfigError
from itpn_core.random import derive, uniform

PUBLISHED_RATIO = 75 / 196
MIN_BLOCK_RATIO = 16 / 196
TRIES = 32
PATIENCE = 10
ASPECT_BINS = 256
_LOG_ASPECT = math.log(1 / 0.3)

ASPECT_ROOTS: tuple[float, ...] = tuple(
    math.exp(0.5 * _LOG_ASPECT * (2 * (i + 0.5) / ASPECT_BINS - 1)) for i in range(ASPECT_BINS)
)
"""Square roots of the aspect ratios: 256 log-spaced values, as `exp` is not correctly rounded on every device."""


def mask_count(cells: int, ratio: float = PUBLISHED_RATIO) -> int:
    """Number of masked cells on a grid of `cells`.

    Args:
        cells: cells of the grid, h * w.
        ratio: share to mask, strictly between 0 and 1.

    Returns:
        round(ratio * cells): 75 on 14 x 14 with the published ratio.

    Raises:
        ConfigError: if no cell, or every cell, would be masked.
    """
    count = round(ratio * cells)
    if not 0 < count < cells:
        allowed = f"must mask at least one and not all of the {cells} patches (it would mask {count})"
        raise ConfigError("objective.mask_ratio", ratio, allowed, "Use more patches per image or another ratio.")
    return count


def _check(grid: tuple[int, int], count: int) -> int:
    cells = grid[0] * grid[1]
    if not 0 <= count <= cells:
        raise ValueError(f"Cannot mask {count} of the {cells} cells of a {grid[0]}x{grid[1]} grid.")
    return cells


def _integer_priority(keys_B: Tensor, cells: int) -> Tensor:
    """int64 [B, cells], all different within a row: 24 random bits, then the cell's index."""
    bits_BN = (uniform(keys_B, cells) * (1 << 24)).to(torch.int64)
    return (bits_BN << 20) + torch.arange(cells, device=keys_B.device)


def _first(order_BN: Tensor, count: int) -> Tensor:
    """Bool [B, N], True at the `count` smallest entries of each row."""
    index_BM = order_BN.argsort(dim=1)[:, :count]
    return torch.zeros_like(order_BN, dtype=torch.bool).scatter(1, index_BM, True)


def uniform_mask(keys_B: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """Masks `count` cells uniformly at random in every image (pixel iTPN).

    Args:
        keys_B: int64 [B], one key per sample.
        grid: (h, w) of the token grid.
        count: cells to mask per image.

    Returns:
        bool [B, h*w], exactly `count` True per row.
    """
    cells = _check(grid, count)
    return _first(_integer_priority(derive(keys_B, "mask_uniform"), cells), count)


class Placement(nn.Module):
    """Tries one rectangle per image; a module, so that it can be compiled: eager, it is dozens of small kernels."""

    def forward(self, mask_BHW: Tensor, skipped_B: Tensor, draws_B4: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The masks after it, and how many rectangles in a row each image has left out.

        Args:
            mask_BHW: bool, masked so far.
            skipped_B: int64; an image that has left out `PATIENCE` takes no more.
            draws_B4: float64 in [0, 1): area, aspect, row and column.
            count: cells that are masked in the end.
        """
        height, width = mask_BHW.shape[1:]
        left_B = count - mask_BHW.sum(dim=(1, 2))
        smallest_B = left_B.clamp(max=max(1, round(MIN_BLOCK_RATIO * height * width)))
        area_B = smallest_B + (draws_B4[:, 0] * (left_B - smallest_B + 1)).floor()
        roots = constant(ASPECT_ROOTS, torch.float64, mask_BHW.device)
        root_B = roots[(draws_B4[:, 1] * ASPECT_BINS).to(torch.int64)]
        rows_B = (area_B.sqrt() * root_B).round().clamp(min=1)
        cols_B = (area_B.sqrt() / root_B).round().clamp(min=1)
        top_B = (draws_B4[:, 2] * (height - rows_B + 1)).floor()
        start_B = (draws_B4[:, 3] * (width - cols_B + 1)).floor()
        y_H = torch.arange(height, device=mask_BHW.device)
        x_W = torch.arange(width, device=mask_BHW.device)
        inside_BH = (y_H >= top_B[:, None]) & (y_H < (top_B + rows_B)[:, None])
        inside_BW = (x_W >= start_B[:, None]) & (x_W < (start_B + cols_B)[:, None])
        new_BHW = inside_BH[:, :, None] & inside_BW[:, None, :] & ~mask_BHW
        added_B = new_BHW.sum(dim=(1, 2))
        fits_B = (rows_B <= height) & (cols_B <= width)
        taken_B = (skipped_B < PATIENCE) & fits_B & (added_B > 0) & (added_B <= left_B)
        return mask_BHW | (new_BHW & taken_B[:, None, None]), torch.where(taken_B, 0, skipped_B + 1)


_EAGER = Placement()


def _distance(mask_BHW: Tensor) -> Tensor:
    """Manhattan distance of each cell to the nearest masked cell, int64 [B, H, W]; 0 inside the mask.

    Separable: first along columns, then along rows. Images without any masked cell get a large constant.
    """
    height, width = mask_BHW.shape[1:]
    far = height + width
    y_H = torch.arange(height, device=mask_BHW.device)
    x_W = torch.arange(width, device=mask_BHW.device)
    cost_BHW = torch.where(mask_BHW, 0, far)
    rows_HH = (y_H[:, None] - y_H).abs()
    cost_BHW = (cost_BHW[:, None] + rows_HH[:, :, None]).amin(dim=2)
    cols_WW = (x_W[:, None] - x_W).abs()
    return (cost_BHW[:, :, None, :] + cols_WW).amin(dim=3)


def block_mask(keys_B: Tensor, grid: tuple[int, int], count: int, place: nn.Module = _EAGER) -> Tensor:
    """Masks `count` cells in rectangles in every image (definition in the module's text).

    Args:
        keys_B: int64 [B], one key per sample.
        grid: (h, w) of the token grid.
        count: cells to mask per image.
        place: a `Placement`, eager or compiled.

    Returns:
        bool [B, h*w], exactly `count` True per row, row-major.
    """
    cells = _check(grid, count)
    draws_BT4 = uniform(derive(keys_B, "mask_block"), 4 * TRIES).to(torch.float64).view(-1, TRIES, 4)
    mask_BHW = torch.zeros(keys_B.shape[0], *grid, dtype=torch.bool, device=keys_B.device)
    skipped_B = torch.zeros_like(keys_B)
    for draws_B4 in draws_BT4.unbind(1):
        mask_BHW, skipped_B = place(mask_BHW, skipped_B, draws_B4, count)
    priority_BN = _integer_priority(derive(keys_B, "mask_fill"), cells)
    empty_B = ~mask_BHW.flatten(1).any(dim=1)
    seed_BN = (priority_BN == priority_BN.amin(dim=1, keepdim=True)) & empty_B[:, None]
    mask_BHW = mask_BHW | seed_BN.view_as(mask_BHW)
    # Masked cells have distance 0, so the first `count` in this order are the mask and what lies around it.
    order_BN = (_distance(mask_BHW).flatten(1) << 44) + priority_BN
    return _first(order_BN, count)
