"""Runs a few real steps of a recipe, without Ray and without leaving anything behind, and measures them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itpn_core.evaluation.cost import training_flops
from orchestrator.config.tree import PretrainConfig
from orchestrator.plan.forecast import Held, Probe
from orchestrator.train.context import Silent
from orchestrator.train.engine import Engine
from orchestrator.train.parallel import units


def probe(config: PretrainConfig, steps: int, batch: int) -> Probe:
    """Measures a recipe on this machine.

    Args:
        config: resolved configuration of the run.
        steps: timed steps, after one for warming up and one for the memory.
        batch: images per step.
    """
    cuda = torch.cuda.is_available() and config.cluster.device != "cpu"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with (
        tempfile.TemporaryDirectory(prefix="probe-") as scratch,
        Engine(_short(config, steps, batch, scratch), Silent(Path(scratch), device=device)) as engine,
    ):
        engine.restore()
        return _measure(engine, device, batch)


def _short(config: PretrainConfig, steps: int, batch: int, scratch: str) -> PretrainConfig:
    """The recipe cut to a few steps; what is measured per image and per step stays as it is."""
    return replace(
        config,
        train=replace(config.train, global_batch=batch, micro_batch=0, max_steps=steps + 2, log_every=1),
        objective=replace(config.objective, target_samples=min(config.objective.target_samples, batch)),
        track=replace(config.track, follow=False, system_every_s=0.0, uri=f"sqlite:///{scratch}/mlflow.db"),
        run=replace(config.run, storage=scratch, name="probe"),
    )


def _measure(engine: Engine, device: torch.device, batch: int) -> Probe:
    state, seconds, memory = engine.state, [], 0.0
    while not engine.finished():
        with engine.batches() as batches:
            for part in batches:
                began = time.perf_counter()
                # The first step also makes the moments, and compiles.
                with activations(state.task, device) if state.step == 1 else nullcontext() as found:
                    engine.step(part)
                    engine.read_window()  # waits for the device
                if found is not None:
                    memory = found.bytes
                elif state.step > 1:
                    seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    snapshot = state.snapshot({})
    copied = time.perf_counter() - began
    task, config = state.task, engine.config
    teacher = getattr(task, "teacher", None)
    grid = task.student.grid
    return Probe(
        parameters=sum(p.numel() for p in task.student.parameters()),
        teacher_parameters=sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0,
        held=held(task),
        averaged=bool(state.average.tensors),
        fixed_bytes=sum(_bytes(t) for t in [*task.buffers(), *(_tensors(teacher) if teacher is not None else [])]),
        activation_bytes_per_image=memory / batch,
        checkpoint_bytes=sum(_bytes(t) for t in snapshot.tensors.values()),
        copy_seconds=copied,
        flops_per_image=training_flops(task, config.data.image_size, device),
        tokens_per_image=grid[0] * grid[1],
        images_per_second=batch / sorted(seconds)[len(seconds) // 2],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU",
    )


@dataclass
class Activations:
    """Most bytes that a step needed beyond weights, moments, averages and gradients."""

    bytes: float = 0.0


@contextmanager
def activations(task: nn.Module, device: torch.device) -> Iterator[Activations]:
    """Measures one step: the allocator's peak on CUDA, elsewhere what the backward pass keeps."""
    if device.type != "cuda":
        with _kept(task) as found:
            yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    with beyond(task, torch.cuda.memory_allocated(device), partial(torch.cuda.max_memory_allocated, device)) as found:
        yield found


@contextmanager
def beyond(task: nn.Module, before: int, peak: Callable[[], int]) -> Iterator[Activations]:
    """Takes from an allocator's peak what was there before the step, and the gradients that were alive at the peak.

    Args:
        task: its gradients are counted as they come.
        before: bytes allocated before the step.
        peak: highest number of bytes allocated so far.
    """
    found = Activations()
    gradients = highest = 0

    def look() -> None:
        nonlocal highest
        now = peak()
        if now > highest:
            highest = now
            found.bytes = max(0.0, float(now - before - gradients))

    def come(parameter: Tensor) -> None:
        nonlocal gradients
        look()  # the peak may have been before this gradient came, so it is not among those taken off yet
        gradients += _bytes(parameter)

    trained: list[Any] = [p for p in task.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(come) for p in trained]
    try:
        yield found
        look()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _kept(task: nn.Module) -> Iterator[Activations]:
    known = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    found = Activations()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.bytes = float(sum(kept.values()))


def held(task: nn.Module) -> tuple[Held, ...]:
    """The task's parameters, with the block that each would be gathered with."""
    block_of = {id(p): number for number, block in enumerate(units(task), start=1) for p in block.parameters()}
    return tuple(
        Held(
            rows=p.shape[0] if p.ndim else 1,
            row_bytes=_bytes(p) // max(1, p.shape[0] if p.ndim else 1),
            trained=p.requires_grad,
            block=block_of.get(id(p), 0),
        )
        for p in task.parameters()
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
