"""Positions for any grid: learned embeddings and relative-bias tables resampled to the size at hand, cached by size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.constants import constant

Grid = tuple[int, int]

# Detection feeds many image sizes; more entries than this would only hold memory.
_CACHED_SIZES = 16
# The public code interpolates to n + 0.1 cells so that rounding never yields n - 1; the offset moves the samples, so
# it is part of the published function.
_PUBLISHED_OFFSET = 0.1


class SizeCache:
    """Results that depend on one parameter and a grid, kept while neither changes.

    Nothing is kept when a gradient must reach the parameter, or while a graph is being compiled or exported (there the
    computation becomes part of the graph). A forward pass whose gradient may change the parameter also ends what was
    kept: fused optimizers write without raising its version. Loops whose forward pass is compiled raise it themselves
    (`torch.autograd.graph.increment_version`).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Grid, bool], tuple[Tensor, tuple[Any, ...], Tensor]] = {}

    def get(self, parameter: Tensor, grid: Grid, compute: Callable[[], Tensor]) -> Tensor:
        """The kept tensor for this state of the parameter and this grid, or a new one."""
        if torch.compiler.is_compiling() or parameter.is_inference():
            return compute()
        if parameter.requires_grad and torch.is_grad_enabled():
            self._kept.clear()
            return compute()
        # a tensor made in inference mode cannot serve autograd later
        key = grid, torch.is_inference_mode_enabled()
        stamp = parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device
        kept = self._kept.get(key)
        if kept is not None and kept[0] is parameter and kept[1] == stamp:
            return kept[2]
        if len(self._kept) >= _CACHED_SIZES and key not in self._kept:
            self._kept.pop(next(iter(self._kept)))
        result = compute()
        self._kept[key] = parameter, stamp, result
        return result

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> SizeCache:
        # a copied model has parameters of its own at other addresses
        return SizeCache()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}


def _shifted(side: int, device: torch.device) -> Tensor:
    """Weights [side, side] of one axis when the published offset alone moves the samples.

    A product with them, because CUDA's bicubic kernel copies where the sizes are equal, whatever the scale, and a model
    must not depend on the device.
    """
    return constant(_shift_weights(side), torch.float32, device).view(side, side)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shift_weights(side: int) -> tuple[float, ...]:
    return _weights(side)


@functools.lru_cache(maxsize=64)
def _weights(side: int) -> tuple[float, ...]:
    with torch.device("cpu"), torch.inference_mode(mode=False):
        unit_1CH1 = torch.eye(side).view(1, side, side, 1)
        scale = [(side + _PUBLISHED_OFFSET) / side, 1.0]
        moved_1CH1 = F.interpolate(unit_1CH1, scale_factor=scale, mode="bicubic", align_corners=False)
    return tuple(moved_1CH1.flatten(1).view(side, side).t().flatten().tolist())


def resample_positions(pos_1NE: Tensor, old: Grid, new: Grid, *, always: bool = False) -> Tensor:
    """Position embeddings of another grid, bicubic, as in the published iTPN code.

    Args:
        pos_1NE: embeddings of the `old` grid in row-major order.
        old: (rows, columns) of `pos_1NE`.
        new: (rows, columns) wanted.
        always: interpolate although the grids are equal, which the published offset makes more than a copy.

    Returns:
        [1, new rows * new columns, E] in the dtype of `pos_1NE`; the very same tensor when the grids are equal (unless
        `always`).
    """
    if old == new and not always:
        return pos_1NE
    width = pos_1NE.shape[-1]
    if old == new:
        rows_HH, cols_WW = (_shifted(side, pos_1NE.device) for side in new)
        map_HWE = pos_1NE.detach().float().reshape(*old, width)
        moved_1NE = torch.einsum("hr,wc,rce->hwe", rows_HH, cols_WW, map_HWE).reshape(pos_1NE.shape).to(pos_1NE.dtype)
        # torch's backward pass copies where the sizes are equal, so the published gradient is the identity
        return pos_1NE + (moved_1NE - pos_1NE.detach())
    map_1EHW = pos_1NE.float().reshape(1, old[0], old[1], width).permute(0, 3, 1, 2)
    scale = [(new[0] + _PUBLISHED_OFFSET) / old[0], (new[1] + _PUBLISHED_OFFSET) / old[1]]
    resized = F.interpolate(map_1EHW, scale_factor=scale, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(pos_1NE.dtype)


def resample_bias_table(table_RH: Tensor, old: Grid, new: Grid) -> Tensor:
    """A relative-position-bias table for another grid, bicubic over the offsets (ours: the public code has none).

    Args:
        table_RH: [(2*rows - 1) * (2*columns - 1), heads] of the `old` grid.
        old: (rows, columns) of the table.
        new: (rows, columns) wanted.

    Returns:
        The table of the new grid; the very same tensor when the grids are equal.
    """
    if old == new:
        return table_RH
    map_1HRC = table_RH.float().t().reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)
    size = [2 * new[0] - 1, 2 * new[1] - 1]
    resized = F.interpolate(map_1HRC, size=size, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).t().to(table_RH.dtype)


def bias_from_table(table_RH: Tensor, grid: Grid) -> Tensor:
    """Attention bias [heads, N, N] from the table of the same grid.

    Entry (query, key) is the table at (query row - key row, query column - key column), both offset to start at 0.
    The bias is block-Toeplitz, so it is a strided window view of the table: no N x N index is needed, and the gradient
    is a sum over windows and not a scatter.
    """
    rows, cols = grid
    map_HRC = table_RH.t().reshape(-1, 2 * rows - 1, 2 * cols - 1)
    # windows[h, s, t, r, c] = map[h, s + r, t + c]; a key at row k starts its window at rows - 1 - k
    windows = map_HRC.unfold(1, rows, 1).unfold(2, cols, 1).flip(1, 2)
    return windows.permute(0, 3, 4, 1, 2).reshape(-1, rows * cols, rows * cols)


def relative_position_index(grid: Grid) -> Tensor:
    """The published checkpoints' buffer: int64 [N, N], the table row of every (query, key) pair."""
    rows, cols = grid
    entries = torch.arange((2 * rows - 1) * (2 * cols - 1), dtype=torch.float64)
    return bias_from_table(entries[:, None], grid)[0].long()


def sincos_positions(width: int, grid: Grid) -> Tensor:
    """Fixed two-dimensional sin-cos embeddings [1, N, width]: half the channels for the column, half for the row.

    Frequencies 10000^(-i / (width / 4)), sines before cosines, as in the MAE code that the pixel flavour follows.
    """
    rows, cols = grid
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    col_N = torch.arange(cols, dtype=torch.float64).repeat(rows)
    row_N = torch.arange(rows, dtype=torch.float64).repeat_interleave(cols)
    parts = [fn(axis[:, None] * omega) for axis in (col_N, row_N) for fn in (torch.sin, torch.cos)]
    return torch.cat(parts, 1).float()[None]
