"""A few steps of the engine in a group of processes, with everything written down that must not depend on the group."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.config.tree import PretrainConfig
from orchestrator.train.context import Silent
from orchestrator.train.engine import Engine
from orchestrator.train.parallel import whole_gradients

KILLED_AFTER = 1
"""Steps before the kill; so it is also the number of the step after the resume."""


@dataclass
class Record:
    """What a group saw, in the order of the global batch."""

    ids: list[list[int]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    """Masks of every step, bool [B, N]; [0] for objectives without."""
    losses: list[float] = field(default_factory=list)
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By step, then by parameter: of the first step of a run and of the one after the kill, where they were taken."""


def walk(config: PretrainConfig, directory: Path, rank: int, world: int, kill_at: int = 0) -> Record:
    """Takes the steps of one rank, from the newest checkpoint in `directory` if there is one.

    Args:
        config: its `train.max_steps` says how far.
        directory: run directory of the group.
        rank: this rank.
        world: size of the group.
        kill_at: SIGKILL to this very process once so many steps are on storage; 0 = never.
    """
    seen = Record()
    masks: list[Tensor] = []
    with Engine(config, Silent(directory, rank, world)) as engine:
        engine.restore()
        _listen(engine, seen, masks)
        while not engine.finished():
            with engine.batches() as batches:
                for batch in batches:
                    masks.clear()
                    engine.step(batch)
                    assert engine.window is not None  # noqa: S101 -- a step was taken
                    seen.ids.append(batch.ids[batch.own].tolist())
                    seen.losses.append(engine.window.read([]).rows[0]["loss"])
                    # One for each micro-batch, in the order of the samples.
                    seen.masks.append(torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool))
                    if kill_at == engine.state.step:
                        engine.save()
                        engine.checkpoints.wait()
                        os.kill(os.getpid(), signal.SIGKILL)
    return seen


def _listen(engine: Engine, seen: Record, masks: list[Tensor]) -> None:
    """Writes down masks as they are drawn, and the gradients of two steps before they are used."""
    task: Any = engine.state.task
    optimizer = engine.state.optimizer
    update, mask = optimizer.step, getattr(task, "mask", None)

    def observed(*arguments: Any) -> Any:
        if engine.state.step in (0, KILLED_AFTER):
            gradients = whole_gradients(task)
            # They are equal on all ranks: one copy is enough.
            seen.gradients[engine.state.step] = {} if engine.run.rank else gradients
        return update(*arguments)

    def drawn(keys_B: Tensor) -> Tensor:
        mask_BN: Tensor = mask(keys_B)  # type: ignore[misc]
        masks.append(mask_BN.clone())
        return mask_BN

    optimizer.step = observed  # type: ignore[assignment, method-assign]
    if mask is not None:
        task.mask = drawn


def run_group(config: PretrainConfig, directory: Path, world: int, timeout_s: float, kill_at: int = 0) -> Record | None:
    """Walks in `world` processes.

    Returns:
        What they saw together; None when they were to be killed and were.

    Raises:
        RuntimeError: a rank failed, or the group took too long.
    """
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    arguments = (config, str(directory), world, _free_port(), kill_at)
    group = [context.Process(target=_child, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in group:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    if kill_at and codes == [-signal.SIGKILL] * world:
        return None
    if codes != [0] * world:
        raise RuntimeError(f"a group of {world} ended with exit codes {codes} (None = not within {timeout_s:g} s)")
    return _together([torch.load(directory / f"rank-{rank}.pt", weights_only=True) for rank in range(world)])


def _child(rank: int, config: PretrainConfig, directory: str, world: int, port: int, kill_at: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    seen = walk(config, Path(directory), rank, world, kill_at)
    torch.save(vars(seen), Path(directory, f"rank-{rank}.pt"))
    if world > 1:
        dist.destroy_process_group()


def _together(ranks: list[dict[str, Any]]) -> Record:
    steps = range(len(ranks[0]["losses"]))
    return Record(
        ids=[[i for rank in ranks for i in rank["ids"][step]] for step in steps],
        masks=[torch.cat([rank["masks"][step] for rank in ranks]) for step in steps],
        losses=ranks[0]["losses"],
        gradients=ranks[0]["gradients"],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
