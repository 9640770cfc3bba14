"""The token layout in which every merge, split and mask of a patch is a view.

A patch of stage 3 covers 4 x 4 cells of stage 1 and 2 x 2 cells of stage 2. Stages 1 and 2 never mix patches, so all
features are kept as [B, N, S, C]: N patches in row-major order, S cells of one patch (16, 4 or 1), C channels last.
The S cells stand in Z-order, column bit before row bit (00, 10, 01, 11 as (row, col)), coarse before fine:

    [B, N, 16, C] -> [B, N, 4, 4C] -> [B, N, 1, 16C]

are then plain reshapes that put the four children of a cell side by side, in the concatenation order of iTPN's merge.
Convolutions whose stride equals their kernel become one matrix product with the kernel in the same order. Masking or
keeping patches is indexing along N. Maps ([B, C, H, W]) exist only at the border.
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor

_SIDES = {1: 1, 4: 2, 16: 4}


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cuts images into the pixel blocks under each stage-1 cell.

    Args:
        images_BCHW: images whose sides are multiples of `patch_size`.
        patch_size: pixels per side of a patch, a multiple of 4.

    Returns:
        [B, N, 16, C*k*k] with k = patch_size / 4; the last axis is ordered (channel, row, column) like a conv kernel.
    """
    batch, channels, height, width = images_BCHW.shape
    rows, cols, k = height // patch_size, width // patch_size, patch_size // 4
    split = images_BCHW.reshape(batch, channels, rows, 2, 2, k, cols, 2, 2, k)
    # B, patch row, patch col, then col/row bits coarse to fine, then channel and pixel
    return split.permute(0, 2, 6, 7, 3, 8, 4, 1, 5, 9).reshape(batch, rows * cols, 16, channels * k * k)


def to_map(x_BNSC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lays the cells of every patch out as an image: [B, N, S, C] -> [B, C, h*sqrt(S), w*sqrt(S)].

    Args:
        x_BNSC: features in the layout of this module; [B, N, C] is read as S = 1.
        grid: patches per column and per row (h, w), h * w = N.
    """
    if x_BNSC.ndim == 3:
        x_BNSC = x_BNSC.unsqueeze(2)
    batch, _, cells, channels = x_BNSC.shape
    rows, cols = grid
    if cells == 1:
        return x_BNSC.reshape(batch, rows, cols, channels).permute(0, 3, 1, 2)
    side = _SIDES[cells]
    if cells == 4:
        split = x_BNSC.reshape(batch, rows, cols, 2, 2, channels).permute(0, 5, 1, 4, 2, 3)
    else:
        split = x_BNSC.reshape(batch, rows, cols, 2, 2, 2, 2, channels).permute(0, 7, 1, 4, 6, 2, 3, 5)
    return split.reshape(batch, channels, rows * side, cols * side)


def row_major(x_BNSC: Tensor) -> Tensor:
    """Cells of each patch in row-major order: [B, N, S, C] -> [B, N, side, side, C]."""
    batch, patches, cells, channels = x_BNSC.shape
    if cells == 1:
        return x_BNSC.unsqueeze(3)
    if cells == 4:
        return x_BNSC.reshape(batch, patches, 2, 2, channels).transpose(2, 3)
    split = x_BNSC.reshape(batch, patches, 2, 2, 2, 2, channels).permute(0, 1, 3, 5, 2, 4, 6)
    return split.reshape(batch, patches, 4, 4, channels)


def cell_order(row_major_SC: Tensor) -> Tensor:
    """Rows of a [S, C] table from row-major to this module's cell order (S = 4 or 16)."""
    cells, channels = row_major_SC.shape
    if cells == 4:
        return row_major_SC.reshape(2, 2, channels).transpose(0, 1).reshape(4, channels)
    split = row_major_SC.reshape(2, 2, 2, 2, channels)
    return split.permute(2, 0, 3, 1, 4).reshape(16, channels)


def kernel_matrix(weight_OIkk: Tensor) -> Tensor:
    """A conv kernel of stride = size as a matrix on concatenated cells: [O, I, k, k] -> [O, k*k*I] (k = 1, 2, 4)."""
    out, channels, side, _ = weight_OIkk.shape
    if side == 1:
        return weight_OIkk.reshape(out, channels)
    if side == 2:
        return weight_OIkk.permute(0, 3, 2, 1).reshape(out, 4 * channels)
    split = weight_OIkk.reshape(out, channels, 2, 2, 2, 2)
    return split.permute(0, 4, 2, 5, 3, 1).reshape(out, 16 * channels)


def transposed_kernel_matrix(weight_IOkk: Tensor) -> Tensor:
    """A 2x2 transposed-conv kernel as a matrix that yields the four children: [I, O, 2, 2] -> [4*O, I]."""
    channels, out, _, _ = weight_IOkk.shape
    return weight_IOkk.permute(3, 2, 1, 0).reshape(4 * out, channels)


def merge_cells(x_BNSC: Tensor) -> Tensor:
    """Puts the four children of each parent cell side by side: [B, N, S, C] -> [B, N, S/4, 4C], a view."""
    batch, patches, cells, channels = x_BNSC.shape
    return x_BNSC.reshape(batch, patches, cells // 4, 4 * channels)


def split_cells(x_BNSC: Tensor, children: int = 4) -> Tensor:
    """Inverse of `merge_cells`: [B, N, S, 4C] -> [B, N, 4S, C], a view."""
    batch, patches, cells, channels = x_BNSC.shape
    return x_BNSC.reshape(batch, patches, cells * children, channels // children)


def take_patches(x: Tensor, ids_BK: Tensor) -> Tensor:
    """Patches of each sample by index: [B, N, ...] and [B, K] to [B, K, ...]."""
    ids = ids_BK.view(*ids_BK.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, ids)


def square_side(count: int) -> int:
    """Side of a square of `count` cells.

    Raises:
        ValueError: when `count` is not a square.
    """
    side = isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} positions do not form a square grid; pass the grid (rows, columns) explicitly.")
    return side
