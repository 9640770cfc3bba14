"""The picture of nearest neighbours shows the images that the features mean."""

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.pick import read_images
from orchestrator.data.views import EvalView
from orchestrator.evaluate.neighbours import Measured, draw_neighbours
from tests.support import tiny_config, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("samples", [0, 10])
def test_images_picked_by_place_are_those_the_loader_gives(data, samples, tmp_path):
    config = tiny_config(data, tmp_path)
    split, view = Manifest.load(data, config.data.store).split("train"), EvalView(16, 1.0, samples)
    with open_loader(
        config.data, split, seed=0, epoch=0, first_batch=0, global_batch=10, rank=0, world=1, view=view
    ) as batches:
        images = torch.cat([batch.images for batch in batches])
    places = np.array([7, 0, 7, len(images) - 1])
    assert torch.equal(read_images(config.data, split, view, places), images[torch.from_numpy(places)])


def test_nearest_are_the_most_similar_and_the_picture_is_drawn(data, tmp_path):
    config = tiny_config(data, tmp_path, "eval.figure_images=3")
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(16, 5, generator=generator), torch.randn(24, 5, generator=generator)
    measured = Measured(bank, torch.arange(16) % 4, queries, torch.arange(24) % 4, torch.arange(16), torch.arange(24))
    similar, found = measured.nearest(torch.tensor([2, 9]), 4)
    for row, query in enumerate((2, 9)):
        all_similar = torch.cosine_similarity(bank, queries[query][None])
        assert torch.allclose(similar[row], all_similar.sort(descending=True).values[:4])
        assert torch.equal(found[row], all_similar.argsort(descending=True)[:4])
    manifest = Manifest.load(data, config.data.store)
    path = draw_neighbours(config, manifest, measured, 3, tmp_path / "figures" / "n.png")
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
