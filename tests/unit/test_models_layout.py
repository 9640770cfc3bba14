"""The cell layout against plain convolutions and rearrangements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.models.layers import CellConv, CellConvTranspose, Mlp
from itpn_core.models.layout import cell_order, merge_cells, patchify, row_major, split_cells, to_map
from itpn_core.models.positions import bias_from_table, relative_position_index, resample_positions, sincos_positions

grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


def cells_of(map_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """Slow inverse of `to_map`: one cell at a time, column bit before row bit, coarse before fine."""
    batch, channels, height, width = map_BCHW.shape
    rows, cols = height // side, width // side
    out = torch.zeros(batch, rows * cols, side * side, channels)
    for row in range(height):
        for col in range(width):
            y, x, index, bit = row % side, col % side, 0, side // 2
            while bit:
                index = index * 4 + (x // bit % 2) * 2 + y // bit % 2
                bit //= 2
            out[:, (row // side) * cols + col // side, index] = map_BCHW[:, :, row, col]
    return out


@settings(max_examples=20)
@given(grid=grids, side=st.sampled_from([1, 2, 4]), channels=st.integers(1, 3))
def test_to_map_places_every_cell(grid, side, channels):
    map_BCHW = torch.randn(2, channels, grid[0] * side, grid[1] * side)
    assert torch.equal(to_map(cells_of(map_BCHW, side), grid), map_BCHW)


@settings(max_examples=20)
@given(grid=grids, patch=st.sampled_from([4, 8, 16]), channels=st.integers(1, 4))
def test_patchify_is_the_stem_convolution(grid, patch, channels):
    side = patch // 4
    images = torch.randn(2, channels, grid[0] * patch, grid[1] * patch)
    conv = torch.nn.Conv2d(channels, 5, side, side)
    cells = F.linear(patchify(images, patch), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(to_map(cells, grid), conv(images))


@settings(max_examples=20)
@given(grid=grids, side=st.sampled_from([1, 2, 4]))
def test_cell_conv_is_a_convolution(grid, side):
    conv, map_BCHW = CellConv(3, 5, side), torch.randn(2, 3, grid[0] * side, grid[1] * side)
    joined = cells_of(map_BCHW, side).flatten(2).unsqueeze(2)
    torch.testing.assert_close(to_map(conv(joined), grid), F.conv2d(map_BCHW, conv.weight, conv.bias, stride=side))


@settings(max_examples=20)
@given(grid=grids, side=st.sampled_from([1, 2]))
def test_cell_conv_transpose_is_a_transposed_convolution(grid, side):
    conv, map_BCHW = CellConvTranspose(3, 5), torch.randn(2, 3, grid[0] * side, grid[1] * side)
    want = F.conv_transpose2d(map_BCHW, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(to_map(conv(cells_of(map_BCHW, side)), grid), want)


@settings(max_examples=20)
@given(grid=grids, side=st.sampled_from([2, 4]))
def test_row_major_and_cell_order_agree(grid, side):
    map_BCHW = torch.randn(2, 3, grid[0] * side, grid[1] * side)
    cells = cells_of(map_BCHW, side)
    rows = row_major(cells)
    assert torch.equal(rows[:, 0], map_BCHW[:, :, :side, :side].permute(0, 2, 3, 1))
    assert torch.equal(cell_order(rows[0, 0].flatten(0, 1)), cells[0, 0])


def test_merges_and_splits_are_views():
    x = torch.randn(2, 3, 16, 5)
    assert merge_cells(x).data_ptr() == x.data_ptr()
    assert torch.equal(split_cells(merge_cells(x)), x)


@settings(max_examples=20)
@given(grid=grids)
def test_bias_is_the_indexed_table(grid):
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1), 2)
    index = relative_position_index(grid)
    count = grid[0] * grid[1]
    assert torch.equal(bias_from_table(table, grid), table[index.flatten()].t().reshape(2, count, count))
    for query in range(count):
        for key in range(count):
            row = query // grid[1] - key // grid[1] + grid[0] - 1
            col = query % grid[1] - key % grid[1] + grid[1] - 1
            assert index[query, key] == row * (2 * grid[1] - 1) + col


def test_resampled_positions_keep_a_constant_and_the_same_grid():
    pos = torch.randn(1, 196, 8)
    assert resample_positions(pos, (14, 14), (14, 14)) is pos
    constant = resample_positions(torch.ones(1, 196, 8), (14, 14), (9, 21))
    torch.testing.assert_close(constant, torch.ones(1, 189, 8))


def test_sincos_positions_are_distinct_and_bounded():
    pos = sincos_positions(64, (5, 7))[0]
    assert pos.shape == (35, 64)
    assert pos.abs().max() <= 1.0
    assert torch.cdist(pos, pos).fill_diagonal_(1.0).min() > 0.1


@pytest.mark.parametrize("conv", [False, True])
def test_hidden_channels_of_zeros_change_nothing(conv):
    """What GPUs get where the hidden width is no multiple of 8, as in the published pyramid (682)."""
    torch.manual_seed(0)
    mlp = Mlp(32, 22, conv=conv).double()
    x = torch.randn(2, 5, 4, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mlp.parameters()]
    aligned, plain = mlp._aligned(x), mlp(x)
    torch.testing.assert_close(aligned, plain, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(out.square().sum(), wanted) for out in (aligned, plain))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
