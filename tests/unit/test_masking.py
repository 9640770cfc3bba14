"""Masks: exact counts, equality with a slow plain twin, independence of the batch, and the shapes they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.errors import ConfigError
from itpn_core.pretraining import masking
from itpn_core.pretraining.masking import Placement, block_mask, mask_count, uniform_mask
from itpn_core.random import derive, stream_keys, uniform

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def keys(n, seed=0):
    return stream_keys(seed, 0, torch.arange(n), "mask")


def plain_rectangle(draws, height, width, left):
    """Top, start, rows, columns of one draw, in plain Python floats."""
    smallest = min(max(1, round(16 / 196 * height * width)), left)
    area = smallest + math.floor(draws[0] * (left - smallest + 1))
    root = masking.ASPECT_ROOTS[int(draws[1] * 256)]
    rows = max(1, round(math.sqrt(area) * root))
    cols = max(1, round(math.sqrt(area) / root))
    return math.floor(draws[2] * (height - rows + 1)), math.floor(draws[3] * (width - cols + 1)), rows, cols


def plain_block_mask(key, grid, count):
    """The definition, one image at a time, with sets and loops."""
    height, width = grid
    one = key[None]
    draws = uniform(derive(one, "mask_block"), 4 * masking.TRIES)[0].tolist()
    priority = uniform(derive(one, "mask_fill"), height * width)[0].tolist()
    masked, skips = set(), 0
    for t in range(masking.TRIES):
        left = count - len(masked)
        if skips == masking.PATIENCE or left == 0:
            break
        top, start, rows, cols = plain_rectangle(draws[4 * t : 4 * t + 4], height, width, left)
        new = {(y, x) for y in range(top, top + rows) for x in range(start, start + cols)} - masked
        if rows <= height and cols <= width and 0 < len(new) <= left:
            masked, skips = masked | new, 0
        else:
            skips += 1
    order = sorted((priority[y * width + x], y * width + x, y, x) for y in range(height) for x in range(width))
    if not masked and count:
        masked.add(order[0][2:])
    while len(masked) < count:
        ring = [
            c[2:] for c in order if c[2:] not in masked and any(abs(c[2] - y) + abs(c[3] - x) == 1 for y, x in masked)
        ]
        masked |= set(ring[: count - len(masked)])
    return torch.tensor([(y, x) in masked for y in range(height) for x in range(width)])


@settings(max_examples=60)
@given(grid=grids, share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_block_mask_equals_the_plain_definition(grid, share, seed):
    count = int(share * grid[0] * grid[1])
    fast = block_mask(keys(3, seed), grid, count)
    assert torch.equal(fast, torch.stack([plain_block_mask(k, grid, count) for k in keys(3, seed)]))


def test_compiled_block_mask_has_the_same_bits():
    place = Placement()
    place.compile()
    assert torch.equal(block_mask(keys(64), (14, 14), 75, place), block_mask(keys(64), (14, 14), 75))


@settings(max_examples=40)
@given(grid=grids, share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_both_masks_have_exactly_the_count(grid, share, seed):
    count = round(share * grid[0] * grid[1])
    for make in (block_mask, uniform_mask):
        mask = make(keys(16, seed), grid, count)
        assert mask.shape == (16, grid[0] * grid[1])
        assert mask.dtype == torch.bool
        assert (mask.sum(1) == count).all()


@pytest.mark.parametrize("make", [block_mask, uniform_mask])
def test_a_mask_does_not_depend_on_its_batch(make):
    whole = make(keys(24), (14, 14), 75)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make(keys(24)[order], (14, 14), 75), whole[order])
    assert torch.equal(torch.cat([make(k[None], (14, 14), 75) for k in keys(24)]), whole)


def test_published_counts():
    assert mask_count(196) == 75
    assert mask_count(256) == 98
    assert mask_count(196, 0.75) == 147
    assert mask_count(16) == 6


@pytest.mark.parametrize(("cells", "ratio"), [(196, 0.0), (196, 1.0), (1, 0.4), (4, 0.9)])
def test_a_ratio_that_masks_nothing_or_all_is_refused(cells, ratio):
    with pytest.raises(ConfigError, match=r"objective.mask_ratio = .*not all of the"):
        mask_count(cells, ratio)


def test_too_many_cells_are_refused():
    with pytest.raises(ValueError, match="Cannot mask 17 of the 16 cells of a 4x4 grid"):
        block_mask(keys(1), (4, 4), 17)


def neighbours_alike(mask, side):
    grid = mask.view(-1, side, side)
    return (grid[:, 1:] == grid[:, :-1]).float().mean().item()


def test_blocks_are_blocks_and_uniform_is_uniform():
    block, flat = block_mask(keys(512), (14, 14), 75), uniform_mask(keys(512), (14, 14), 75)
    assert neighbours_alike(block, 14) > 0.8
    assert neighbours_alike(flat, 14) < 0.56
    # Every cell is masked by chance 75/196; its standard error over 4,096 images is 0.0076.
    rate = uniform_mask(keys(4096), (14, 14), 75).float().mean(0)
    assert (rate - 75 / 196).abs().max() < 5 * 0.0076
    # Rectangles reach a corner less often than the middle, but no cell may be always or never masked.
    rate = block.float().mean(0)
    assert 0.01 < rate.min() < rate.max() < 0.7


def test_few_images_reach_the_limit_of_tries():
    """The limit keeps shapes static; it must not be what ends the search."""
    full = block_mask(keys(256), (14, 14), 75)
    old = masking.TRIES
    try:
        masking.TRIES = 2 * old
        more = block_mask(keys(256), (14, 14), 75)
    finally:
        masking.TRIES = old
    assert (full == more).all(1).float().mean() > 0.98
