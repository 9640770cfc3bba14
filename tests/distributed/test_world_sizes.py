"""Any number of ranks computes the same training: same samples, same losses, same gradients."""

import itertools
import multiprocessing
import os
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from orchestrator.train.engine import Engine
from orchestrator.train.parallel import Replicated, whole_gradients
from orchestrator.train.step import Step
from tests.support import LocalRun, tiny_classifier, tiny_config, write_shards

WORDS = ("train.precision=fp64", "train.epochs=4", "checkpoint.every_epochs=0", "train.log_every=1")
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"), per_class=27)


@dataclass
class Recording:
    """What one rank, or a group together, saw: ids, masks and losses of every step, gradients of the first."""

    ids: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    """Bool [B, N] per step; [0, 0] for tasks without a mask."""
    losses: list = field(default_factory=list)
    gradients: dict = field(default_factory=dict)


def note_masks(task, drawn):
    """Writes down the masks of a task as they are drawn, in the order of the samples."""
    if not hasattr(task, "mask"):
        return
    real = task.mask

    def mask(keys_B):
        drawn.append(real(keys_B).clone())
        return drawn[-1]

    task.mask = mask


def run_steps(config, rank, world, first=0, last=STEPS):
    """Walks the engine's own steps, from a checkpoint when there is one, and records them."""
    seen, drawn = Recording(), []
    with Engine(config, LocalRun(config, rank, world)) as engine:
        engine.restore()
        assert engine.state.step == first
        real_step = engine.state.optimizer.step

        def observed():
            if engine.state.step == first:
                seen.gradients.update(whole_gradients(engine.state.task))
            return real_step()

        engine.state.optimizer.step = observed
        note_masks(engine.state.task, drawn)
        while engine.state.step < last:
            with engine.batches() as batches:
                for batch in batches:
                    drawn.clear()
                    engine.step(batch)
                    seen.masks.append(torch.cat(drawn) if drawn else torch.empty(0, 0, dtype=torch.bool))
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
        torch.save(vars(seen), f"{place}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_world(world, port, data, tmp_path, *words, first=0, last=STEPS, make=tiny_config):
    """Runs a group of processes and joins what they saw, in the order of the global batch."""
    tmp_path.mkdir(exist_ok=True)
    arguments = (world, port, (data, tmp_path, *WORDS, *words), first, last, str(tmp_path), make)
    # Forks of one process that has imported everything: several times faster than fresh interpreters.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(child, arguments, nprocs=world, start_method="forkserver")
    ranks = [Recording(**torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)) for rank in range(world)]
    assert all(r.losses == ranks[0].losses for r in ranks), "ranks disagree about the losses"
    ids = [list(itertools.chain(*parts)) for parts in zip(*(r.ids for r in ranks), strict=True)]
    masks = [torch.cat(parts) for parts in zip(*(r.masks for r in ranks), strict=True)]
    return Recording(ids, masks, ranks[0].losses, ranks[0].gradients)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return run_steps(tiny_config(data, tmp_path_factory.mktemp("one"), *WORDS), 0, 1)


def assert_same_gradients(found, expected):
    """Norm-wise within 1e-10; tensors that are nearly zero beside the whole are compared absolutely."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.norm()), 1e-8 * float(whole))
        assert float((found[name] - gradient).norm()) <= 1e-10 * scale, name


def assert_same_masks(found, expected):
    """Of every step and sample; and each step has masks of its own."""
    assert len(found) == len(expected)
    for step, (mask_BN, expected_BN) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mask_BN, expected_BN), f"step {step}"
    assert all(0 < int(mask_BN.sum()) < mask_BN.numel() for mask_BN in expected)


def assert_same_run(found, expected):
    assert found.ids == expected.ids
    assert_same_masks(found.masks, expected.masks)
    assert found.losses == pytest.approx(expected.losses, rel=1e-8)
    assert_same_gradients(found.gradients, expected.gradients)


@pytest.mark.parametrize(("world", "port"), [(2, 29611), (3, 29612)])
def test_worlds_agree_in_float64(data, alone, tmp_path, world, port):
    assert_same_run(run_world(world, port, data, tmp_path / "w"), alone)


@pytest.mark.long
@pytest.mark.parametrize(("world", "port"), [(4, 29613), (5, 29614)])
def test_larger_worlds_agree_in_float64(data, alone, tmp_path, world, port):
    assert_same_run(run_world(world, port, data, tmp_path / "w"), alone)


def test_micro_batches_change_nothing(data, alone, tmp_path):
    assert_same_run(run_world(2, 29615, data, tmp_path / "w", "train.micro_batch=3"), alone)


def count_reductions(rank, port, place, words):
    """Writes down, per step, the forward passes and how many numbers were handed over to be reduced."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    steps, parameters = [], []
    real_begin, real_forward, real_step = Replicated.begin, Replicated.forward, Step.__call__

    def reduce(_, bucket):
        steps[-1][1] += bucket.buffer().numel()
        return allreduce_hook(None, bucket)

    def begin(self):
        real_begin(self)
        parameters.append(sum(parameter.numel() for _, parameter in self.trainable))
        self._model.register_comm_hook(None, reduce)

    def forward(self, *arguments):
        steps[-1][0] += 1
        return real_forward(self, *arguments)

    def step(self, *arguments):
        steps.append([0, 0])
        return real_step(self, *arguments)

    Replicated.begin, Replicated.forward, Step.__call__ = begin, forward, step
    try:
        run_steps(tiny_config(*words), rank, 2, last=3)
        torch.save({"steps": steps, "parameters": parameters}, f"{place}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("micro_batch", "passes", "port"), [(0, 1, 29633), (3, 3, 29634)])
def test_gradients_are_reduced_once_a_step(data, tmp_path, micro_batch, passes, port):
    """However many micro-batches a rank's eight images make."""
    words = (data, tmp_path, *WORDS, f"train.micro_batch={micro_batch}")
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(count_reductions, (port, str(tmp_path), words), nprocs=2, start_method="forkserver")
    for rank in range(2):
        told = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        (parameters,) = told["parameters"]
        assert told["steps"] == [[passes, parameters]] * 3, rank


@pytest.mark.long
def test_resized_run_sees_the_same_samples_masks_and_losses(data, alone, tmp_path):
    """4 -> 2 -> 3 ranks; a global batch of 16 does not divide by 3."""
    place = tmp_path / "resized"
    save = ("checkpoint.every_steps=100",)
    seen = Recording()
    for world, first, last, port in ((4, 0, 7, 29616), (2, 7, 13, 29617), (3, 13, STEPS, 29618)):
        part = run_world(world, port, data, place, *save, first=first, last=last)
        seen.ids += part.ids
        seen.masks += part.masks
        seen.losses += part.losses
    assert seen.ids == alone.ids
    assert_same_masks(seen.masks, alone.masks)
    assert seen.losses == pytest.approx(alone.losses, rel=1e-8)


@pytest.mark.parametrize(("world", "port"), [(2, 29619), pytest.param(4, 29620, marks=pytest.mark.long)])
def test_float32_gradient_of_more_ranks_is_close(data, tmp_path, world, port):
    words = ("train.precision=fp32",)
    seen = run_steps(tiny_config(data, tmp_path / "one", *WORDS, *words), 0, 1, last=1)
    gradients = run_world(world, port, data, tmp_path / "w", *words, last=1).gradients
    whole = torch.cat([g.flatten() for g in seen.gradients.values()])
    found = torch.cat([gradients[name].flatten() for name in seen.gradients])
    assert float((found - whole).norm()) <= 1e-5 * float(whole.norm())


@pytest.mark.long
def test_compiled_blocks_on_two_ranks_agree_with_eager_ones(data, alone, tmp_path):
    """`aot_eager` traces as the default backend does, and leaves out the code generator."""
    words = ("train.compile=true", "train.compile_backend=aot_eager")
    found = run_world(2, 29621, data, tmp_path / "w", *words, last=6)
    assert found.losses == pytest.approx(alone.losses[:6], rel=1e-8)
    assert_same_gradients(found.gradients, alone.gradients)


# With 15 images, two ranks cut a pair of mixed images; so do micro-batches of three.
CUT = ("train.global_batch=15",)


@pytest.fixture(scope="module")
def classifier_alone(data, tmp_path_factory):
    return run_steps(tiny_classifier(data, tmp_path_factory.mktemp("one"), *WORDS, *CUT), 0, 1, last=6)


@pytest.mark.parametrize(("words", "port"), [((), 29631), (("train.micro_batch=3",), 29632)], ids=["whole", "micro"])
def test_mixing_erasing_and_drop_path_agree_on_two_ranks(data, classifier_alone, tmp_path, words, port):
    found = run_world(2, port, data, tmp_path / "w", *CUT, *words, last=6, make=tiny_classifier)
    assert found.losses == pytest.approx(classifier_alone.losses, rel=1e-8)
    assert_same_gradients(found.gradients, classifier_alone.gradients)
