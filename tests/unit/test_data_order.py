"""The order is a permutation, the same for every world size, and can be entered anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core.errors import ConfigError
from orchestrator.data.order import SampleOrder, SequentialOrder, part
from orchestrator.data.permute import permute, unpermute


@st.composite
def orders(draw):
    return SampleOrder(
        samples=draw(st.integers(1, 300)),
        seed=draw(st.integers(-(2**40), 2**40)),
        streams=draw(st.integers(1, 40)),
        run=draw(st.integers(1, 40)),
        block_runs=draw(st.integers(1, 9)),
        last=draw(st.sampled_from(["drop", "short"])),
    )


@given(orders(), st.integers(5, 100), st.integers(0, 5))
@settings(max_examples=60)
def test_every_sample_exactly_once_per_epoch(order, global_batch, epoch):
    batches = [order.batch(epoch, k, global_batch) for k in range(order.batches_per_epoch(global_batch))]
    dropped = order.dropped(epoch, global_batch)
    seen = np.concatenate([*batches, dropped])
    assert sorted(seen.tolist()) == list(range(order.samples))
    assert len(dropped) == (order.samples % global_batch if order.last == "drop" else 0)
    assert all(len(batch) == global_batch for batch in batches[:-1])


@given(orders(), st.integers(5, 100), st.lists(st.integers(1, 17), min_size=1, max_size=6), st.data())
@settings(max_examples=40)
def test_kills_and_resizes_change_nothing(order, global_batch, worlds, data):
    """A run that is stopped anywhere and goes on with any number of ranks sees the uninterrupted run's batches."""
    total = order.batches_per_epoch(global_batch)
    whole = [order.batch(0, k, global_batch).tolist() for k in range(total)]
    position, seen = 0, []
    for number, world in enumerate(worlds):
        last = number == len(worlds) - 1
        stop = total if last else data.draw(st.integers(position, total))
        for k in range(position, stop):
            parts = []
            for rank in range(world):
                low, high = part(order.batch_size(k, global_batch), world, rank)
                parts.append(order.batch(0, k, global_batch, low, high))
            sizes = [len(p) for p in parts]
            assert max(sizes) - min(sizes) <= 1
            seen.append(np.concatenate(parts).tolist())
        position = stop
    assert seen == whole


@given(orders(), st.integers(5, 100), st.integers(0, 3))
@settings(max_examples=40)
def test_slots_is_the_inverse_of_batch(order, global_batch, epoch):
    batch, slot = order.slots(epoch, np.arange(order.samples), global_batch)
    for k in range(order.batches_per_epoch(global_batch)):
        ids = order.batch(epoch, k, global_batch)
        assert (batch[ids] == k).all()
        assert (slot[ids] == np.arange(len(ids))).all()
    assert (batch[order.dropped(epoch, global_batch)] == order.batches_per_epoch(global_batch)).all()


@given(st.integers(1, 10**12), st.integers(0, 2**31 - 1), st.data())
@settings(max_examples=60)
def test_permutation_has_an_inverse_and_stays_inside(size, tweak, data):
    values = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    names = {"seed": 1, "epoch": 2, "name": "x", "tweak_B": tweak}
    images = permute(values, size, **names)
    assert ((images >= 0) & (images < size)).all()
    assert len(set(images.tolist())) == len(values)
    assert (unpermute(images, size, **names) == values).all()


def test_permutations_are_well_mixed():
    """Each of 24 orders of 4 elements, and each image of one element, is about equally frequent."""
    trials = 2400
    blocks = np.repeat(np.arange(trials), 4)
    images = permute(np.tile(np.arange(4), trials), 4, seed=0, epoch=0, name="mix", tweak_B=blocks).reshape(trials, 4)
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == 24
    expected = trials / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 23 degrees of freedom, p < 4e-5


def test_large_shuffle_has_no_trend():
    size = 10**10
    places = np.arange(20_000, dtype=np.int64)
    images = permute(places, size, seed=0, epoch=0, name="big")
    assert abs(np.corrcoef(places, images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert abs(images.mean() / size - 0.5) < 0.01


def test_epochs_and_seeds_differ():
    order = SampleOrder(10_000, seed=0)
    first = order.batch(0, 0, 256)
    assert set(first.tolist()) != set(order.batch(1, 0, 256).tolist())
    assert set(first.tolist()) != set(SampleOrder(10_000, seed=1).batch(0, 0, 256).tolist())


def test_dropped_samples_differ_between_epochs():
    order = SampleOrder(1000, seed=0)
    dropped = [tuple(sorted(order.dropped(epoch, 300).tolist())) for epoch in range(4)]
    assert len(set(dropped)) == 4


def test_a_reader_of_one_stream_touches_only_its_blocks():
    """A rank that owns one of 8 streams reads about one eighth of the runs, not all of them."""
    order = SampleOrder(64_000, seed=0, streams=8, run=32, block_runs=4)
    low, high = part(256, 8, 3)
    ids = np.concatenate([order.batch(0, k, 256, low, high) for k in range(order.batches_per_epoch(256))])
    runs = len(np.unique(ids // 32))
    assert runs <= 2000 / 8 + 2 * 4  # its share and at most a block at either end that it shares


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_sequential_order(samples, batch):
    order = SequentialOrder(samples)
    ids = [order.batch(0, k, batch) for k in range(order.batches_per_epoch(batch))]
    assert np.concatenate(ids).tolist() == list(range(samples))


def test_refusals():
    with pytest.raises(ConfigError, match=r"data\.last_batch = 'keep'"):
        SampleOrder(10, 0, last="keep")
    with pytest.raises(IndexError, match="batch 3 of 3"):
        SampleOrder(10, 0).batch(0, 3, 3)
