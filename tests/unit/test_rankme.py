"""Feature health and confidence: known answers of RankMe, spread, PCA colours, standard errors."""

import math

import pytest
import torch

from itpn_core.evaluation import accuracy, feature_std, paired_difference, pca_colours, rankme


def test_rankme_of_known_spectra():
    q, _ = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert rankme(q) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.outer(torch.rand(50) + 1, torch.rand(6) + 1)) == pytest.approx(1, abs=1e-3)
    assert rankme(q[:, :4] * torch.tensor([1, 1, 0, 0])) == pytest.approx(2, rel=1e-3)
    assert math.isfinite(rankme(torch.zeros(10, 4)))


def test_feature_std_sees_collapse():
    features = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(features).item() == pytest.approx(1, 0.05)
    assert feature_std(torch.ones(32, 16)).item() == 0


def test_pca_colours_separate_two_regions_and_repeat():
    g = torch.Generator().manual_seed(0)
    maps = 0.05 * torch.randn(2, 12, 6, 6, generator=g)
    maps[:, :, :, 3:] += torch.randn(12, 1, 1, generator=g)
    colours = pca_colours(maps)
    assert colours.shape == (2, 3, 6, 6)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert (colours[:, 0, :, 3:].mean() - colours[:, 0, :, :3].mean()).abs() > 0.8
    assert torch.equal(colours, pca_colours(maps))


def test_accuracy_and_its_standard_error():
    estimate = accuracy(torch.arange(100) < 80)
    assert estimate.value == 0.8
    assert estimate.standard_error == pytest.approx(0.04)
    low, high = estimate.interval()
    assert (low, high) == (pytest.approx(0.7216), pytest.approx(0.8784))
    with pytest.raises(ValueError, match="evaluation split is empty"):
        accuracy(torch.zeros(0, dtype=torch.bool))


def test_paired_difference_uses_the_pairs():
    first, second = torch.arange(100) < 80, torch.arange(100) < 70
    estimate = paired_difference(first, second)
    assert estimate.value == pytest.approx(0.1)
    # Ten discordant pairs, all one way: variance 0.1 - 0.01 per pair.
    assert estimate.standard_error == pytest.approx(math.sqrt(0.09 / 100))
    assert paired_difference(first, first).standard_error == 0
    with pytest.raises(ValueError, match="100 and 99"):
        paired_difference(first, second[:99])


def test_paired_interval_covers_the_truth():
    g = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(400):
        shared = torch.rand(300, generator=g)
        first, second = shared < 0.7, (shared + 0.1 * torch.randn(300, generator=g)) < 0.6
        truth = 0.7 - 0.6037  # P(u + 0.1 z < 0.6) for u uniform on [0, 1] is 0.6 up to the ends' mass
        low, high = paired_difference(first, second).interval()
        hits += low <= truth + 0.0037 <= high
    assert 0.91 < hits / 400 < 0.985
