"""Pairs of the global batch are together on every rank and in every micro-batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.config import DataConfig
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import TrainView
from orchestrator.train.step import even_parts, whole_pairs
from tests.support import write_shards


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return Manifest.load(write_shards(tmp_path_factory.mktemp("data"), per_class=12)).split("train")


def batches(split, world, rank, *, pairs, workers=0):
    config = DataConfig(source=split.uri, streams=4, run=4, block_runs=2, workers=workers, last_batch="short")
    with open_loader(
        config, split, seed=0, epoch=0, first_batch=0, global_batch=11, rank=rank, world=world, view=TrainView(8),
        pairs=pairs,
    ) as loader:  # fmt: skip
        return list(loader)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_own_the_same_slots_and_hold_their_partners(split, world):
    whole = batches(split, 1, 0, pairs=False)
    ranks = [batches(split, world, rank, pairs=True) for rank in range(world)]
    plain = [batches(split, world, rank, pairs=False) for rank in range(world)]
    for number, batch in enumerate(whole):
        owned = [r[number].ids[r[number].own] for r in ranks]
        assert torch.equal(torch.cat(owned), batch.ids)
        for rank, expected in zip(ranks, plain, strict=True):
            part = rank[number]
            assert torch.equal(part.images[part.own], expected[number].images)
            held = np.arange(part.first, part.first + len(part.ids))
            assert torch.equal(part.ids, batch.ids[held])
            own = held[part.own]
            partners = own ^ 1
            assert set(partners[partners < len(batch.ids)]) <= set(held)
            assert len(held) <= len(own) + 2


def test_worker_processes_give_the_same_pairs(split):
    alone = batches(split, 2, 1, pairs=True)
    helped = batches(split, 2, 1, pairs=True, workers=2)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.images, two.images)
        assert (one.first, one.own) == (two.first, two.own)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
def test_micro_batches_widen_to_whole_pairs_that_are_at_hand(size, world, parts):
    for rank in range(world):
        low, high = size * rank // world, size * (rank + 1) // world
        first = low - low % 2 if low < high else low
        last = min(high + high % 2, size) if low < high else high
        for piece in even_parts(high - low, parts):
            part = slice(low - first + piece.start, low - first + piece.stop)
            wide = whole_pairs(part, first, last - first)
            held = set(range(first + wide.start, first + wide.stop))
            own = range(first + part.start, first + part.stop)
            assert held >= {slot ^ 1 for slot in own if slot ^ 1 < size}
            assert held >= set(own)
            assert len(held) <= len(own) + 2
