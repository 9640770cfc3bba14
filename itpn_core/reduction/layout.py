"""Window-major order: which cell of the stage-3 grid stands in which slot of the token sequence.

The order is fixed once per grid and window. Windows follow each other row-major; inside a window the valid cells come
first, row-major, and the slots that lie outside the grid (pads) come last, so that a window that loses tokens keeps its
pads in the same slots in every image. A pad slot repeats cell 0, is masked as a key and never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True)
class WindowOrder:
    """Slots of a grid cut into windows; S = windows * length.

    Attributes:
        grid: (rows, columns) of the cells; N cells.
        window: (rows, columns) of a window, clipped to the grid.
        windows: number of windows W.
        length: slots per window L.
        cells: int64 [S], the row-major cell of every slot; 0 in pads.
        valid: bool [S], False in pads.
        slots: int64 [N], the slot of every cell.
        padded: whether any slot is a pad.
        identity: whether slots and cells are the same thing (one window over the whole grid).
    """

    grid: Grid
    window: Grid
    windows: int
    length: int
    cells: Tensor
    valid: Tensor
    slots: Tensor
    padded: bool
    identity: bool


def window_order(grid: Grid, window: int) -> WindowOrder:
    """The window-major order of a grid.

    Args:
        grid: (rows, columns).
        window: side of a window in cells; clipped to the grid's sides; 0 = the whole grid.
    """
    rows, cols = grid
    high, wide = (min(window or side, side) for side in grid)
    down, across = -(-rows // high), -(-cols // wide)
    row = torch.arange(down * high).view(down, 1, high, 1)
    col = torch.arange(across * wide).view(1, across, 1, wide)
    inside = ((row < rows) & (col < cols)).reshape(down * across, high * wide)
    cell = (row * cols + col).reshape(down * across, high * wide)
    pads_last = (~inside).to(torch.int8).argsort(dim=1, stable=True)
    valid_S = inside.gather(1, pads_last).flatten()
    cell_S = cell.gather(1, pads_last).flatten() * valid_S
    slot_N = torch.empty(rows * cols, dtype=torch.int64)
    slot_N[cell_S[valid_S]] = valid_S.nonzero().flatten()
    windows, length = down * across, high * wide
    padded = windows * length != rows * cols
    return WindowOrder(grid, (high, wide), windows, length, cell_S, valid_S, slot_N, padded, windows == 1)


def to_windows(x_BNE: Tensor, order: WindowOrder) -> Tensor:
    """Row-major tokens [B, N, E] in window-major order [B, S, E]; the very same tensor for one window."""
    return x_BNE if order.identity else x_BNE.index_select(1, order.cells.to(x_BNE.device))


def from_windows(x_BSE: Tensor, order: WindowOrder) -> Tensor:
    """Inverse of `to_windows`: drops the pads, [B, S, E] to [B, N, E]."""
    return x_BSE if order.identity else x_BSE.index_select(1, order.slots.to(x_BSE.device))


def run_means(order: WindowOrder, count: int, per_window: bool) -> Tensor:
    """Averaging weights of the zero-shot gathering tokens: float32 [T, S] with g = weights @ x.

    Token i is the mean of the i-th of `count` near-equal contiguous runs (as `tensor_split` cuts them) of the valid
    slots in window-major order, over the grid (T = count) or within each window (T = windows * count, window-major).

    Args:
        order: the slots.
        count: gathering tokens G, at most the valid slots there are.
        per_window: own tokens in each window.
    """
    slots = torch.arange(len(order.valid)).view(order.windows if per_window else 1, -1)
    rows = []
    for group in slots:
        for run in group[order.valid[group]].tensor_split(count):
            row_S = torch.zeros(len(order.valid))
            row_S[run] = 1.0 / max(1, len(run))
            rows.append(row_S)
    return torch.stack(rows)
