"""Mixing is a function of the global batch alone, and what an image shows is what its label says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.errors import ConfigError
from itpn_core.finetuning.config import FinetuneTaskConfig
from itpn_core.finetuning.mixing import beta_quantiles, mix_pairs, soft_labels
from itpn_core.random import stream_keys

CLASSES = 5
SIDE = 8


def batch(count, seed=0, epoch=0):
    """Images of one constant each (their slot), labels, keys."""
    images = torch.arange(count, dtype=torch.float64)[:, None, None, None].expand(-1, 3, SIDE, SIDE).clone()
    labels = torch.arange(count) % CLASSES
    return images, labels, stream_keys(seed, epoch, torch.arange(100, 100 + count), "objective")


def mixed(count, config, valid=None, low=0, high=None, seed=0):
    images, labels, keys = batch(count, seed)
    valid = torch.ones(count, dtype=torch.bool) if valid is None else valid
    targets = soft_labels(labels, CLASSES, config.label_smoothing, torch.float64)
    part = slice(low, high)
    return mix_pairs(images[part], targets[part], keys[part], valid[part], config)


configs = st.builds(
    FinetuneTaskConfig,
    label_smoothing=st.sampled_from([0.0, 0.1]),
    mixup=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    cutmix=st.sampled_from([0.0, 1.0]),
    mix_share=st.sampled_from([0.5, 1.0]),
)


@settings(max_examples=60)
@given(configs, st.integers(1, 17), st.data())
def test_any_cut_of_the_batch_gives_the_same_images_and_labels(config, count, data):
    whole = mixed(count, config)
    low = data.draw(st.integers(0, count - 1))
    high = data.draw(st.integers(low + 1, count))
    first, last = low - low % 2, min(high + high % 2, count)
    part = mixed(count, config, low=first, high=last)
    own = slice(low - first, high - first)
    assert torch.equal(part.images[own], whole.images[low:high])
    assert torch.equal(part.targets[own], whole.targets[low:high])


@settings(max_examples=60)
@given(configs, st.integers(1, 17), st.integers(0, 1000))
def test_labels_sum_to_one_and_follow_the_pixels(config, count, seed):
    images, targets = mixed(count, config, seed=seed)
    assert targets.sum(dim=1).tolist() == pytest.approx([1.0] * count, abs=1e-6)
    own, partner = torch.arange(count), torch.arange(count) ^ 1
    partner = torch.where(partner < count, partner, own)
    # with constant images the mean tells how much of the partner is in the picture
    share = (images.mean(dim=(1, 2, 3)) - own) / torch.where(partner == own, 1, partner - own)
    labels = own % CLASSES
    smooth = config.label_smoothing
    expected = (1 - smooth) * (1 - share) + smooth / CLASSES
    differ = labels != partner % CLASSES
    found = targets[own, labels]
    assert found[differ].tolist() == pytest.approx(expected[differ].tolist(), abs=1e-6)


def test_a_hole_leaves_its_partner_alone():
    config = FinetuneTaskConfig(label_smoothing=0.0)
    valid = torch.tensor([True, False, True, True])
    images, targets = mixed(4, config, valid=valid)
    assert torch.equal(images[0], batch(4)[0][0])
    assert targets[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert not torch.equal(images[2], batch(4)[0][2])


def test_shares_of_mixup_and_cutmix_are_as_asked():
    count = 4000
    images, _, _ = batch(count)
    cut_only = mixed(count, FinetuneTaskConfig(mixup=0.0)).images
    values = torch.isin(cut_only, torch.tensor([0.0])) | (cut_only == cut_only.round())
    assert values.all(), "cutmix copies pixels, it does not blend them"
    both = mixed(count, FinetuneTaskConfig(cutmix_share=0.25, mix_share=0.5))
    blended = (both.images != both.images.round()).flatten(1).any(dim=1).double().mean()
    assert float(blended) == pytest.approx(0.5 * 0.75, abs=0.03)
    changed = (both.images != images).flatten(1).any(dim=1).double().mean()
    assert float(changed) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_quantiles_have_the_moments_of_the_distribution(alpha):
    table = beta_quantiles(alpha).astype(np.float64)
    middle = (table[1:] + table[:-1]) / 2
    assert table[0] == pytest.approx(0, abs=1e-6)
    assert table[-1] == pytest.approx(1, abs=1e-6)
    assert (np.diff(table) >= 0).all()
    assert middle.mean() == pytest.approx(0.5, abs=1e-4)
    assert middle.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-2)


@pytest.mark.parametrize("word", ["mixup=-1", "mix_share=1.5", "label_smoothing=1", "std=(0, 1, 1)"])
def test_impossible_settings_are_refused(word):
    name, value = word.split("=")
    with pytest.raises(ConfigError, match="finetune"):
        FinetuneTaskConfig(**{name: eval(value)})
