"""RandAugment and erasing: real changes, within bounds, the same whoever decodes the sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.config import AugmentConfig
from orchestrator.data.strong import DRAWS_PER_OP, ERASE_DRAWS, OPERATORS, erase, rand_augment
from orchestrator.data.views import TrainView, render

STRONG = TrainView(24, (0.3, 1.0), (0.75, 1.33), AugmentConfig(rand_ops=2, erase=0.5))


def photograph(seed=0, side=32):
    rng = np.random.default_rng(seed)
    smooth = rng.random((side // 8, side // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.ascontiguousarray((255 * (0.7 * smooth + 0.3 * rng.random((side, side, 3)))).astype(np.uint8))


def seen(ids, seed=3, epoch=1, view=STRONG):
    """What the loader makes of samples, each with its own picture."""
    draws = view.draws(seed, epoch, np.asarray(ids, dtype=np.int64))
    out = torch.empty((len(ids), 3, view.image_size, view.image_size), dtype=torch.uint8)
    for slot, sample in enumerate(ids):
        pixels = photograph(sample)
        render(pixels, view.box(*pixels.shape[:2], draws[slot]), out[slot])
        view.finish(out[slot], draws[slot])
    return out


@settings(max_examples=25)
@given(st.permutations(range(8)), st.integers(1, 8))
def test_a_sample_looks_the_same_in_any_batch(order, cut):
    whole = seen(range(8))
    parts = torch.cat([seen(part) for part in (order[:cut], order[cut:]) if part])
    assert torch.equal(parts, whole[list(order)])


def test_epochs_and_seeds_differ():
    assert not torch.equal(seen([0, 1], epoch=1), seen([0, 1], epoch=2))
    assert not torch.equal(seen([0, 1], seed=3), seen([0, 1], seed=4))


def test_crop_does_not_depend_on_strong_augmentation():
    plain = TrainView(24, (0.3, 1.0), (0.75, 1.33))
    ids = np.arange(6)
    for row, strong in zip(plain.draws(0, 0, ids), STRONG.draws(0, 0, ids), strict=True):
        assert plain.box(40, 30, row) == STRONG.box(40, 30, strong)


@pytest.mark.parametrize("index", range(len(OPERATORS)), ids=list(OPERATORS))
def test_every_operator_changes_a_photograph_at_full_strength(index):
    # 24 levels in a narrow band, so that autocontrast and equalize have something to do
    image = torch.from_numpy(photograph()).permute(2, 0, 1) // 2 + 40
    which = (index + 0.5) / len(OPERATORS)
    for sign in (0.1, 0.9):
        found = rand_augment(image, [which, 0.0, 0.0, 0.0, sign], 10.0, 0.0)
        assert found.shape == image.shape
        assert found.dtype == torch.uint8
        assert not torch.equal(found, image)
    assert torch.equal(rand_augment(image, [which, 0.7, 0.0, 0.0, 0.1], 10.0, 0.0), image)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=ERASE_DRAWS, max_size=ERASE_DRAWS))
def test_erasing_keeps_to_a_box_of_allowed_area(draws):
    image = torch.zeros((3, 32, 32), dtype=torch.uint8)
    erase(image, [0.0, *draws[1:]], 1.0)
    changed = image.any(dim=0)
    if not changed.any():
        return  # ten boxes that do not fit
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert 0.01 * 32 * 32 <= area <= 0.36 * 32 * 32
    untouched = torch.zeros((3, 32, 32), dtype=torch.uint8)
    erase(untouched, [0.5, *draws[1:]], 0.5)
    assert not untouched.any()


def test_half_of_the_operators_are_applied():
    draws = TrainView(8, augment=AugmentConfig(rand_ops=1)).draws(0, 0, np.arange(4000))[:, -DRAWS_PER_OP:]
    assert float((draws[:, 1] < 0.5).mean()) == pytest.approx(0.5, abs=0.03)
    assert len(np.unique((draws[:, 0] * len(OPERATORS)).astype(int))) == len(OPERATORS)
