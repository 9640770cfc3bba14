"""What a model caches by weight is never out of date, whatever changed the weights."""

import copy

import pytest
import torch

from orchestrator.train.compiling import run_eager
from orchestrator.train.engine import Engine
from tests.support import LocalRun, tiny_classifier, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("words", [(), ("train.compile=true", "train.compile_backend=aot_eager")])
def test_an_evaluation_sees_the_weights_of_its_step(data, tmp_path, words):
    """The first evaluation caches relative biases; the fused optimizer then changes their tables unseen."""
    words = (*words, "model.family=itpn_clip", "train.optimizer.lr=0.05", "train.precision=fp32")
    with Engine(tiny_classifier(data, tmp_path, *words), LocalRun(tiny_classifier(data, tmp_path, *words))) as engine:
        engine.restore()
        engine.evaluate()
        with engine.batches() as batches:
            for _ in range(3):
                engine.step(next(batches))
        images = torch.rand(4, 3, 16, 16)
        with engine.state.averaged() as task, torch.no_grad(), run_eager():
            task.eval()
            assert torch.equal(task.logits(images), copy.deepcopy(task).logits(images))
