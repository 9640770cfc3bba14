"""Damaged images that `data.quarantine_budget` tolerates are left out of evaluations, and said."""

from pathlib import Path

import pytest
import torch

from orchestrator.data.errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import EvalView
from orchestrator.evaluate.features import collect, right_or_not
from orchestrator.train.loop import train
from orchestrator.train.statistics import fit_statistics
from tests.support import LocalRun, tiny_classifier, tiny_config, write_shards


def damage(source, split, sample):
    """Changes a byte of a sample's first member on disk."""
    shards, number = Manifest.load(source).split(split).shards, sample
    for shard in shards:
        if number < shard.samples:
            break
        number -= shard.samples
    index = ShardIndex.from_bytes(Path(source, shard.index).read_bytes(), shard.index)
    tar = Path(source, shard.name)
    data = bytearray(tar.read_bytes())
    data[int(index.members["offset"][index.first[number]])] ^= 255
    tar.write_bytes(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    source = write_shards(tmp_path_factory.mktemp("data"))
    damage(source, "train", 20)
    for sample in (0, 7):
        damage(source, "val", sample)
    return source


BUDGET = ("data.quarantine_budget=5", "eval.baselines=true")


def test_pretraining_measures_what_can_be_read(data, tmp_path):
    bank = Manifest.load(data).split("train").samples
    stages = ("eval.stages=true", "eval.stage_images=40", f"eval.bank={bank}", "eval.figure_images=4")
    config = tiny_config(data, tmp_path, *BUDGET, *stages)
    outcome = train(config, LocalRun(config))
    queries = Manifest.load(data).split("val").samples
    assert f"{queries - 2} val queries (2 damaged)" in outcome.protocol
    top1 = outcome.scores["k-NN trained"][0]
    assert top1 * (queries - 2) == pytest.approx(round(top1 * (queries - 2)))


def test_fine_tuning_measures_what_can_be_read(data, tmp_path):
    config = tiny_classifier(data, tmp_path, BUDGET[0])
    outcome = train(config, LocalRun(config))
    assert "(2 damaged)" in outcome.protocol


def test_rows_know_their_places(data, tmp_path):
    config = tiny_config(data, tmp_path, BUDGET[0])
    split = Manifest.load(data).split("val")
    flat = collect(lambda images: images.flatten(1), config.data, split, EvalView(16), 5, 0, 1, torch.device("cpu"))
    assert flat.damaged == [0, 7]
    assert flat.places.tolist() == [place for place in range(split.samples) if place not in (0, 7)]
    assert len(flat.features) == len(flat.labels) == split.samples - 2
    assert (flat.labels >= 0).all()
    known = {"damaged": flat.damaged, "a": [1, 3], "b": []}
    flags = right_or_not(known, 9)
    assert list(flags) == ["a", "b"]
    assert [len(some) for some in flags.values()] == [7, 7]
    assert flags["a"].nonzero().flatten().tolist() == [0, 2]


def test_a_split_without_one_good_image_is_said(tmp_path):
    source = write_shards(tmp_path / "bad", per_class=4)
    split = Manifest.load(source).split("val")
    for sample in range(split.samples):
        damage(source, "val", sample)
    config = tiny_config(source, tmp_path, f"data.quarantine_budget={split.samples}")
    with pytest.raises(DataError, match="no image of the split 'val' could be read"):
        collect(lambda images: images.flatten(1), config.data, split, EvalView(16), 5, 0, 1, torch.device("cpu"))


def test_target_statistics_do_not_see_holes(data, tmp_path):
    """A hole comes as a black image, which would pull the mean."""
    config = tiny_config(data, tmp_path, *BUDGET)
    train_split = Manifest.load(data).split("train")
    seen = []

    class Task:
        needs_statistics = True

        def fit_target_statistics(self, batches):
            seen.extend(image for batch in batches for image in batch)

    fit_statistics(Task(), config, train_split, LocalRun(config))
    assert len(seen) == train_split.samples - 1
    assert all(image.max() > 0 for image in seen)
