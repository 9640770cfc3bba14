"""Linear probe: learns what is linear, is deterministic, chooses its rate without the queries."""

import pytest
import torch

from itpn_core.evaluation import linear_probe


def clusters(n, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 24, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 6, (n,), generator=g)
    # Channels of very different scale: the probe has to standardise.
    return (centres[labels] + noise * torch.randn(n, 24, generator=g)) * torch.logspace(-3, 3, 24), labels


def test_learns_linear_classes_and_repeats_bit_for_bit():
    train, labels = clusters(600, 0.5)
    query, truth = clusters(300, 0.5, seed=1)
    first = linear_probe(train, labels, query, epochs=10, batch=128)
    again = linear_probe(train, labels, query, epochs=10, batch=128)
    assert (first.predictions == truth).float().mean() > 0.95
    assert torch.equal(first.predictions, again.predictions)
    assert first.held_out == again.held_out


def test_the_rate_is_chosen_without_the_queries():
    train, labels = clusters(400, 1.0)
    a = linear_probe(train, labels, clusters(50, 1.0, seed=1)[0], epochs=4)
    b = linear_probe(train, labels, clusters(50, 9.0, seed=2)[0], epochs=4)
    assert a.rate == b.rate == max(a.held_out, key=a.held_out.get)


def test_one_rate_needs_no_choice_and_gives_what_the_choice_would_have_given():
    train, labels = clusters(400, 1.0)
    query, _ = clusters(50, 1.0, seed=1)
    chosen = linear_probe(train, labels, query, epochs=4)
    given = linear_probe(train, labels, query, rates=(chosen.rate,), epochs=4)
    assert given.rate == chosen.rate
    assert given.held_out == {}
    assert torch.equal(given.predictions, chosen.predictions)


def test_random_labels_stay_near_chance():
    g = torch.Generator().manual_seed(0)
    train, labels = torch.randn(2000, 8, generator=g), torch.randint(0, 10, (2000,), generator=g)
    truth = torch.randint(0, 10, (1000,), generator=g)
    result = linear_probe(train, labels, torch.randn(1000, 8, generator=g), epochs=3)
    assert (result.predictions == truth).float().mean() < 0.15


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"found \(30, 4\), \(29,\), \(5, 4\)"):
        linear_probe(torch.randn(30, 4), torch.zeros(29, dtype=torch.long), torch.randn(5, 4))
