"""Any number of ranks computes the same training: same samples, same losses, same gradients."""

import itertools
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.train.engine import Engine
from orchestrator.train.parallel import whole_gradients
from tests.support import LocalRun, tiny_classifier, tiny_config, write_shards

WORDS = ("train.precision=fp64", "train.epochs=4", "checkpoint.every_epochs=0", "train.log_every=1")
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"), per_class=27)


class Recording:
    """What one rank saw: ids of every batch, losses of every step, gradients of the first."""

    def __init__(self):
        self.ids, self.losses, self.gradients = [], [], {}


def run_steps(config, rank, world, first=0, last=STEPS):
    """Walks the engine's own steps, from a checkpoint when there is one, and records them."""
    seen = Recording()
    with Engine(config, LocalRun(config, rank, world)) as engine:
        engine.restore()
        assert engine.state.step == first
        real_step = engine.state.optimizer.step

        def observed():
            if engine.state.step == first:
                seen.gradients.update(whole_gradients(engine.state.task))
            return real_step()

        engine.state.optimizer.step = observed
        while engine.state.step < last:
            with engine.batches() as batches:
                for batch in batches:
                    engine.step(batch)
                    seen.ids.append(batch.ids.tolist())
                    seen.losses.append(engine.window.read([False]).rows[0]["loss"])
                    if engine.state.step == last:
                        break
        if config.checkpoint.every_steps:
            engine.save()
    return seen


def child(rank, world, port, words, first, last, place, make):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        seen = run_steps(make(*words), rank, world, first, last)
        torch.save((seen.ids, seen.losses, seen.gradients), f"{place}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_world(world, port, data, tmp_path, *words, first=0, last=STEPS, make=tiny_config):
    """Runs a group of processes and joins what they saw: (ids per step over all ranks, losses, gradients)."""
    tmp_path.mkdir(exist_ok=True)
    arguments = (world, port, (data, tmp_path, *WORDS, *words), first, last, str(tmp_path), make)
    # Forks of one process that has imported everything: several times faster than fresh interpreters.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(child, arguments, nprocs=world, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]
    ids = [list(itertools.chain(*parts)) for parts in zip(*(r[0] for r in ranks), strict=True)]
    assert all(r[1] == ranks[0][1] for r in ranks), "ranks disagree about the losses"
    return ids, ranks[0][1], ranks[0][2]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    seen = run_steps(tiny_config(data, tmp_path_factory.mktemp("one"), *WORDS), 0, 1)
    return seen.ids, seen.losses, seen.gradients


def assert_same_gradients(found, expected):
    """Norm-wise within 1e-10; tensors that are nearly zero beside the whole are compared absolutely."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.norm()), 1e-8 * float(whole))
        assert float((found[name] - gradient).norm()) <= 1e-10 * scale, name


@pytest.mark.parametrize(("world", "port"), [(2, 29611), (3, 29612)])
def test_worlds_agree_in_float64(data, alone, tmp_path, world, port):
    ids, losses, gradients = run_world(world, port, data, tmp_path / "w")
    assert ids == alone[0]
    assert losses == pytest.approx(alone[1], rel=1e-8)
    assert_same_gradients(gradients, alone[2])


@pytest.mark.long
@pytest.mark.parametrize(("world", "port"), [(4, 29613), (5, 29614)])
def test_larger_worlds_agree_in_float64(data, alone, tmp_path, world, port):
    ids, losses, gradients = run_world(world, port, data, tmp_path / "w")
    assert ids == alone[0]
    assert losses == pytest.approx(alone[1], rel=1e-8)
    assert_same_gradients(gradients, alone[2])


def test_micro_batches_change_nothing(data, alone, tmp_path):
    ids, losses, gradients = run_world(2, 29615, data, tmp_path / "w", "train.micro_batch=3")
    assert ids == alone[0]
    assert losses == pytest.approx(alone[1], rel=1e-8)
    assert_same_gradients(gradients, alone[2])


@pytest.mark.long
def test_resized_run_sees_the_same_samples_and_losses(data, alone, tmp_path):
    """4 -> 2 -> 3 ranks; a global batch of 16 does not divide by 3."""
    place = tmp_path / "resized"
    save = ("checkpoint.every_steps=100",)
    ids, losses = [], []
    for world, first, last, port in ((4, 0, 7, 29616), (2, 7, 13, 29617), (3, 13, STEPS, 29618)):
        part = run_world(world, port, data, place, *save, first=first, last=last)
        ids += part[0]
        losses += part[1]
    assert ids == alone[0]
    assert losses == pytest.approx(alone[1], rel=1e-8)


def test_float32_gradient_of_two_ranks_is_close(data, tmp_path):
    words = ("train.precision=fp32",)
    seen = run_steps(tiny_config(data, tmp_path / "one", *WORDS, *words), 0, 1, last=1)
    _, _, gradients = run_world(2, 29619, data, tmp_path / "w", *words, last=1)
    whole = torch.cat([g.flatten() for g in seen.gradients.values()])
    found = torch.cat([gradients[name].flatten() for name in seen.gradients])
    assert float((found - whole).norm()) <= 1e-5 * float(whole.norm())


# With 15 images, two ranks cut a pair of mixed images; so do micro-batches of three.
CUT = ("train.global_batch=15",)


@pytest.fixture(scope="module")
def classifier_alone(data, tmp_path_factory):
    seen = run_steps(tiny_classifier(data, tmp_path_factory.mktemp("one"), *WORDS, *CUT), 0, 1, last=6)
    return seen.losses, seen.gradients


@pytest.mark.parametrize(("words", "port"), [((), 29631), (("train.micro_batch=3",), 29632)], ids=["whole", "micro"])
def test_mixing_erasing_and_drop_path_agree_on_two_ranks(data, classifier_alone, tmp_path, words, port):
    _, losses, gradients = run_world(2, port, data, tmp_path / "w", *CUT, *words, last=6, make=tiny_classifier)
    assert losses == pytest.approx(classifier_alone[0], rel=1e-8)
    assert_same_gradients(gradients, classifier_alone[1])
