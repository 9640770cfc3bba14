"""k-NN: equality with a plain loop, chunking, invariances, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.evaluation import knn_classify, raw_pixel_features


def plain_knn(bank, labels, query, k):
    predictions = []
    for q in query.tolist():
        scored = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(q, row, strict=True))
            scored.append((dot / (math.hypot(*q) * math.hypot(*row)), label))
        votes = {}
        for similarity, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + max(similarity, 0.0)
        predictions.append(max(votes, key=votes.get))
    return predictions


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), dim=st.integers(2, 9))
def test_equals_a_plain_loop(seed, k, dim):
    g = torch.Generator().manual_seed(seed)
    # Shifted away from the origin: all similarities positive and no ties.
    bank, query = torch.randn(40, dim, generator=g) + 3, torch.randn(15, dim, generator=g) + 3
    labels = torch.randint(0, 4, (40,), generator=g)
    assert knn_classify(bank, labels, query, k).tolist() == plain_knn(bank, labels, query, k)


def test_chunks_and_scale_change_nothing():
    g = torch.Generator().manual_seed(0)
    bank, query, labels = torch.randn(200, 16, generator=g), torch.randn(77, 16, generator=g), torch.arange(200) % 7
    whole = knn_classify(bank, labels, query)
    assert torch.equal(whole, knn_classify(bank, labels, query, chunk=8))
    assert torch.equal(whole, knn_classify(bank * torch.rand(200, 1, generator=g).add(0.5), labels, query * 7))


def test_finds_its_own_clusters_in_low_precision():
    g = torch.Generator().manual_seed(1)
    centres, labels = torch.randn(5, 32, generator=g), torch.arange(500) % 5
    points = centres[labels] + 0.3 * torch.randn(500, 32, generator=g)
    predicted = knn_classify(points[:400].bfloat16(), labels[:400], points[400:].bfloat16())
    assert (predicted == labels[400:]).all()


def test_no_queries_give_no_predictions():
    assert knn_classify(torch.randn(20, 4), torch.zeros(20, dtype=torch.long), torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("bank", "labels", "query", "words"),
    [
        ((5, 4), 5, (3, 4), "k = 10 neighbours need a bank of at least k samples; it has 5"),
        ((20, 4), 19, (3, 4), "19 labels do not match a bank of 20"),
        ((20, 4), 20, (3, 5), "must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(bank, labels, query, words):
    with pytest.raises(ValueError, match=words):
        knn_classify(torch.randn(bank), torch.zeros(labels, dtype=torch.long), torch.randn(query))


def test_centred_pixels_ignore_brightness():
    images = torch.rand(3, 1, 4, 4)
    assert torch.allclose(raw_pixel_features(images, True), raw_pixel_features(images + 0.5, True), atol=1e-6)
    assert raw_pixel_features(images, False).shape == (3, 16)
