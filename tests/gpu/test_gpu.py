"""What only a GPU can show: draws, published numbers, no wait in a step, number formats, compiling, resuming.

Skipped where there is none. CUDA adds up in another order from run to run in few places; the tolerances say how far
losses may then be apart.
"""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from itpn_core.pretraining.beside import Pending
from itpn_core.pretraining.masking import Placement, block_mask, uniform_mask
from itpn_core.random import stream_keys, uniform
from itpn_core.task import Examples
from orchestrator.data.config import AugmentConfig
from orchestrator.data.device import augment
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.parallel import Replicated, Sharded
from orchestrator.train.step import Step
from tests.golden.adapter import build
from tests.golden.cases import CASES, Case, run
from tests.support import LocalRun, losses, tiny_config, write_shards
from tests.unit.test_tasks import batch, make

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # older torch uses it itself
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # switched off on purpose
]

RESUMED, FP32 = 1e-5, 1e-4
"""Relative difference of losses that is allowed: a resumed run; one that is compiled, or on the other device."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: float32 is float32."""
    torch.set_float32_matmul_precision("highest")


@contextmanager
def waits_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def curve(data, folder, *words, device="cuda"):
    config = tiny_config(data, folder, "train.log_every=1", *words)
    local = LocalRun(config, device=device)
    train(config, local)
    return losses(local)


def apart(first, second):
    assert first.keys() == second.keys()
    return max(abs(first[step] - second[step]) / abs(first[step]) for step in first)


def test_draws_and_masks_have_the_bits_of_the_cpu():
    ids = torch.arange(512)
    keys = stream_keys(3, 1, ids, "objective")
    compiled = Placement()
    compiled.compile()
    assert torch.equal(stream_keys(3, 1, ids.cuda(), "objective").cpu(), keys)
    assert torch.equal(uniform(keys.cuda(), 60).cpu(), uniform(keys, 60))
    wanted = block_mask(keys, (14, 14), 75)
    assert torch.equal(block_mask(keys.cuda(), (14, 14), 75).cpu(), wanted)
    assert torch.equal(block_mask(keys.cuda(), (14, 14), 75, compiled).cpu(), wanted)
    assert torch.equal(uniform_mask(keys.cuda(), (14, 14), 147).cpu(), uniform_mask(keys, (14, 14), 147))
    images = torch.randint(0, 256, (512, 3, 8, 8), dtype=torch.uint8)
    flips = AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0)
    # CUDA divides by 255 as it multiplies by the reciprocal: the last bit may differ, and no decision hangs on it
    torch.testing.assert_close(
        augment(images.cuda(), ids, 3, 1, flips).cpu(), augment(images, ids, 3, 1, flips), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("*.json")))
def test_published_models(name):
    """The stored tolerances are for one CPU; sums of other length and order are allowed four times as much."""
    case = Case.load(name)
    outputs, gradients = run(case, build(case.manifest), "cuda")
    print(name, "outputs", max(outputs.values()), "gradients", max(gradients.values(), default=0.0))
    assert max(outputs.values()) < 4.0, outputs
    assert max(gradients.values(), default=0.0) < 4.0


@pytest.mark.parametrize(
    "words", [(), ("train.precision=fp16",), ("train.micro_batch=6",)], ids=["bf16", "fp16", "parts"]
)
def test_nothing_in_a_step_waits_for_the_device(data, tmp_path, monkeypatch, words):
    config = tiny_config(data, tmp_path, *words)
    real, seen = Step.__call__, []

    def watched(self, batch, count):
        if self.state.step < 2:  # the first steps allocate
            return real(self, batch, count)
        torch.cuda.synchronize()
        with waits_are_errors():
            values = real(self, batch, count)
        seen.append(self.state.step)
        return values

    monkeypatch.setattr(Step, "__call__", watched)
    assert train(config, LocalRun(config, device="cuda")).step == 8
    assert seen == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_resumes_to_the_same_losses(data, tmp_path, precision):
    words = (f"train.precision={precision}", "train.log_every=1")
    whole = curve(data, tmp_path / "whole", *words)
    config = tiny_config(data, tmp_path / "cut", *words)
    first = LocalRun(config, device="cuda")
    first.stop_after = 3
    assert train(config, first).stopped == "test"
    second = LocalRun(config, attempt=2, device="cuda")
    assert train(config, second).step == 8
    difference = apart(whole, losses(second))
    print(precision, "resumed", difference)
    assert difference <= RESUMED


def test_losses_are_those_of_the_cpu(data, tmp_path):
    words = ("train.precision=fp32",)
    difference = apart(curve(data, tmp_path / "g", *words), curve(data, tmp_path / "c", *words, device="cpu"))
    print("gpu and cpu", difference)
    assert difference <= FP32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_formats_stay_near_float32(data, tmp_path, precision):
    full = curve(data, tmp_path / "full", "train.precision=fp32")
    reduced = curve(data, tmp_path / "reduced", f"train.precision={precision}")
    print(precision, "and fp32", apart(full, reduced))
    assert all(math.isfinite(value) for value in reduced.values())
    assert apart(full, reduced) < 0.05


@pytest.mark.parametrize("kind", ["fast", "clip"])
def test_a_teacher_on_its_own_stream_teaches_the_same(kind):
    """Many steps without a wait, so that memory that is used too early would show."""
    images, keys = (each.cuda() for each in batch(n=64))
    numbers = torch.arange(len(images), device="cuda")
    found = []
    for own_stream in (False, True):
        task = make(kind).cuda()
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1e-3)
        if own_stream:
            task.teach_beside(torch.device("cuda"))
        curve = []
        for step in range(40):
            seen, targets = task.prepare(Examples(images.roll(step, 0), numbers * 0, numbers >= 0, keys))
            assert isinstance(targets, Pending) is own_stream
            loss = task(seen, targets, keys).loss_B.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        found.append(torch.stack(curve))
    torch.testing.assert_close(found[1], found[0], rtol=FP32, atol=0)


@pytest.mark.timeout(600)
def test_compiled_losses_are_those_of_eager_code(data, tmp_path):
    eager = curve(data, tmp_path / "eager", "train.precision=fp32")
    difference = apart(eager, curve(data, tmp_path / "compiled", "train.precision=fp32", "train.compile=true"))
    print("compiled", difference)
    assert difference <= FP32


def test_a_cut_model_computes_what_a_whole_one_does(data, tmp_path):
    """FSDP2 over NCCL with one rank: all its code runs, on the device."""
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert norm_of_a_step(data, tmp_path / "cut", cut=True) == pytest.approx(
            norm_of_a_step(data, tmp_path / "whole", cut=False), rel=1e-6
        )
    finally:
        dist.destroy_process_group()


def norm_of_a_step(data, folder, *, cut, device="cuda"):
    config = tiny_config(data, folder, "train.precision=fp32")
    with Engine(config, LocalRun(config, device=device)) as engine:
        task = engine.state.task
        parallel = Sharded(task, init_device_mesh(device, (1,))) if cut else Replicated(task, torch.device(device), 1)
        parallel.begin()
        numbers = torch.arange(8, device=device)
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
        keys = stream_keys(0, 0, numbers, "objective")
        student_images, targets = task.prepare(Examples(images, numbers * 0, numbers >= 0, keys))
        parallel.forward(student_images, targets, keys).loss_B.mean().backward()
        parallel.take_gradients()
        gradients = [p.grad for _, p in parallel.trainable if p.grad is not None]
        return parallel.total_norm(torch.nn.utils.get_total_norm(gradients)).item()
