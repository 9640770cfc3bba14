"""Runs a few real steps of a recipe, without Ray and without leaving anything behind, and measures them."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itpn_core.evaluation.cost import training_flops
from orchestrator.config.tree import PretrainConfig
from orchestrator.plan.forecast import Probe
from orchestrator.train.context import Silent
from orchestrator.train.engine import Engine
from orchestrator.train.state import TrainState


def probe(config: PretrainConfig, steps: int, batch: int) -> Probe:
    """Measures a recipe on this machine.

    Args:
        config: resolved configuration of the run.
        steps: timed steps, after one for warming up.
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
        train=replace(config.train, global_batch=batch, micro_batch=0, max_steps=steps + 1, log_every=1),
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
                if state.step == 0:
                    memory = _activation_bytes(engine, part, device)
                else:
                    engine.step(part)
                    engine.read_window()  # waits for the device
                    seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    snapshot = state.snapshot({})
    copied = time.perf_counter() - began
    task, config = state.task, engine.config
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    teacher = getattr(task, "teacher", None)
    grid = task.student.grid
    return Probe(
        parameters=sum(p.numel() for p in task.student.parameters()),
        trained=trained,
        teacher_parameters=sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0,
        state_bytes=_state_bytes(state) + sum(_bytes(p) for p in task.parameters() if p.requires_grad),
        activation_bytes_per_image=memory / batch,
        checkpoint_bytes=sum(_bytes(t) for t in snapshot.tensors.values()),
        copy_seconds=copied,
        flops_per_image=training_flops(task, config.data.image_size, device),
        tokens_per_image=grid[0] * grid[1],
        images_per_second=batch / sorted(seconds)[len(seconds) // 2],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU",
    )


def _activation_bytes(engine: Engine, part: Any, device: torch.device) -> float:
    """Memory of one step beyond the state: the allocator's on CUDA, elsewhere what the backward pass keeps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        engine.step(part)
        engine.read_window()
        # The first step also made gradients and moments.
        grown = sum(_bytes(p) for p in engine.state.task.parameters() if p.requires_grad) * 3
        return max(0.0, float(torch.cuda.max_memory_allocated(device) - before - grown))
    known = {p.untyped_storage().data_ptr() for p in engine.state.task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.step(part)
    engine.read_window()
    return float(sum(kept.values()))


def _state_bytes(state: TrainState) -> int:
    tensors = [*state.task.parameters(), *state.task.buffers(), *state.average.tensors.values()]
    teacher = getattr(state.task, "teacher", None)
    if teacher is not None:
        tensors += [*teacher.parameters(), *teacher.buffers()]
    moments = [value for each in state.optimizer.state.values() for value in each.values()]
    return sum(_bytes(t) for t in tensors + moments)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
