"""Hangs are noticed, written down by every rank that still can, told to a person, and cured by a new start."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrator.data.loader import Loader
from orchestrator.data.views import TrainView
from orchestrator.train import watchdog
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.step import Step
from orchestrator.train.watchdog import EXIT_HUNG
from orchestrator.train.window import Window
from tests.support import LocalRun, losses, tiny_config, write_shards

STEPS = 12
WORDS = ("train.max_steps=12", "train.epochs=5", "train.log_every=1", "checkpoint.every_steps=1")
HANG_S = 3.0


class WrittenRun(LocalRun):
    """Notes go to a file, as this process may end at any moment."""

    def note(self, text):
        path = Path(f"{self.folder.uri}.notes")
        path.write_text((path.read_text() if path.exists() else "") + text + "\n\n")


def never_returns(*_):
    threading.Event().wait()


def reads_for_ever(rank):
    """Rank 1's third batch never comes."""
    real, seen = Loader.__next__, []

    def read(self):
        if isinstance(self._spec.view, TrainView):
            seen.append(self)
            if rank == 1 and len(seen) == 4:
                never_returns()
        return real(self)

    Loader.__next__ = read


def skips_a_collective(rank):
    """Rank 1 thinks that the losses of step 4 need no sum over ranks."""
    real = Window.read

    def read(self, flags, summands=()):
        if rank == 1 and Engine.watched_step == 4:
            self._world, world = 1, self._world
            try:
                return real(self, flags, summands)
            finally:
                self._world = world
        return real(self, flags, summands)

    real_step = Engine.step

    def step(self, batch):
        real_step(self, batch)
        Engine.watched_step = self.state.step

    Engine.step, Window.read = step, read


def enters_another_collective(rank):
    """Rank 1 leaves out the sum of the losses of step 4, and waits in step 5 for a call that rank 0 never makes.

    In one group, gloo would notice that the sizes of two calls differ; NCCL would not. A group of its own waits.
    """
    real_step, groups = Step.__call__, []

    def step(self, *arguments):
        if not groups:
            groups.append(dist.new_group())
        if rank == 1 and self.state.step == 4:
            dist.all_reduce(torch.zeros(1), group=groups[0])
        return real_step(self, *arguments)

    def read(self, flags, summands=()):
        if rank == 1 and Engine.watched_step == 4:
            self._world = 1
        return real_read(self, flags, summands)

    real_read, real_engine_step = Window.read, Engine.step

    def engine_step(self, batch):
        real_engine_step(self, batch)
        Engine.watched_step = self.state.step

    Engine.step, Window.read, Step.__call__ = engine_step, read, step


def goes_slowly(_):
    real = Engine.step

    def step(self, batch):
        time.sleep(0.2)
        real(self, batch)

    Engine.step = step


FAULTS = {
    "": lambda _: None, "read": reads_for_ever, "skip": skips_a_collective, "another": enters_another_collective,
    "slow": goes_slowly,
}  # fmt: skip


def child(rank, port, data, storage, fault, attempt):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    watchdog.GRACE_S, watchdog.TELL_S = 1.5, 0.2
    FAULTS[fault](rank)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    config = tiny_config(data, Path(storage), *WORDS, f"train.guard.hang_s={HANG_S}")
    train(config, WrittenRun(config, rank, 2, attempt))
    os._exit(0)  # the other rank may be gone: nothing to take leave of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def start(data, storage, fault="", attempt=1):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [
        context.Process(target=child, args=(rank, port, data, str(storage), fault, attempt), daemon=True)
        for rank in (0, 1)
    ]
    for process in group:
        process.start()
    return group


def join(group, seconds=120):
    for process in group:
        process.join(seconds)
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    return codes


def finish_after(data, storage, fault):
    """The same run started again comes to its end; returns what a person was told in all."""
    assert join(start(data, storage, attempt=2)) == [0, 0], fault
    config = tiny_config(data, storage, *WORDS)
    assert sorted(losses(LocalRun(config))) == list(range(1, STEPS + 1))
    return Path(f"{LocalRun(config).folder.uri}.notes").read_text()


def reports(storage):
    (incident,) = (Path(storage) / "tiny" / "hangs").iterdir()
    return {p.name: json.loads(p.read_text().splitlines()[0]) for p in incident.glob("rank-*")}, incident


def test_a_read_that_never_returns(data, tmp_path):
    assert join(start(data, tmp_path, "read")) == [EXIT_HUNG, EXIT_HUNG]
    found, incident = reports(tmp_path)
    assert found["rank-00001.txt"]["phase"] == "data"
    assert found["rank-00000.txt"]["phase"] == "compute"
    assert found["rank-00000.txt"]["collective"] == "gradients of step 3"
    assert len(found["rank-00001.txt"]["samples"]) == 8
    told = finish_after(data, tmp_path, "read")
    assert "rank 1 of 2" in told.split("started again")[1].splitlines()[1]
    assert "never_returns" in told
    assert "resumed from the checkpoint of step 3" in told
    assert told.count("the group hangs") == 1
    assert (incident / "rank-00000.txt").read_text().count("Thread 0x") >= 2


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank(data, tmp_path, stopped):
    group = start(data, tmp_path, "slow")
    checkpoints = tmp_path / "tiny" / "checkpoints"
    deadline = time.monotonic() + 100
    while not list(checkpoints.glob("step-*/COMMITTED.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(group[stopped].pid, signal.SIGSTOP)
    group[1 - stopped].join(60)
    assert group[1 - stopped].exitcode == EXIT_HUNG
    join(group, 0)
    found, incident = reports(tmp_path)
    assert len(found) == 2
    seen = found[f"rank-{stopped:05d}.txt"]
    assert seen["seen_by"] == 1 - stopped
    assert "is stopped" in seen["state"]
    stacks = (incident / f"rank-{stopped:05d}.txt").read_text()
    # Reading another process takes a right that this machine may not give.
    assert "train/loop.py" in stacks or "(no stack: " in stacks
    told = finish_after(data, tmp_path, "stopped")
    assert f"rank {stopped} of 2 is the slowest and wrote nothing: its process (pid {group[stopped].pid})" in told
    assert told.count("the group hangs") == 1


def test_a_rank_that_skips_a_collective(data, tmp_path):
    """The calls no longer match: the group ends by the watchdog or by an error, never in silence, and resumes."""
    codes = join(start(data, tmp_path, "skip"))
    assert all(code not in (0, None) for code in codes)
    told = finish_after(data, tmp_path, "skip")
    assert "resumed from the checkpoint" in told


def test_ranks_in_different_collectives_are_told_apart(data, tmp_path):
    """Nobody notices that the calls do not match: all wait, all write their stacks, and the one behind is named."""
    assert join(start(data, tmp_path, "another")) == [EXIT_HUNG, EXIT_HUNG]
    found, incident = reports(tmp_path)
    behind, ahead = found["rank-00000.txt"], found["rank-00001.txt"]
    assert behind["collective"] == "losses up to step 4"
    assert ahead["collective"] == "gradients of step 4"
    assert ahead["collectives"] == behind["collectives"] + 1
    assert behind["seen_by"] == ahead["seen_by"] == -1, "each wrote for itself"
    assert (behind["step"], ahead["step"]) == (4, 4)
    for name, inside in (("rank-00000.txt", "train/window.py"), ("rank-00001.txt", "train/engine.py")):
        stacks = (incident / name).read_text().split("\n", 1)[1]
        assert stacks.count("hread 0x") >= 2, "the watchdog's thread and the training one at least"
        assert "train/loop.py" in stacks
        assert inside in stacks
    told = finish_after(data, tmp_path, "another").split("the group hangs")
    assert len(told) == 2, "told once"
    assert "rank 0 of 2: " in told[1]
    assert "last collective call: losses up to step 4" in told[1]
    assert "train/window.py" in told[1], "the stack of the rank that the others wait for"
    assert "rank 1 of 2" not in told[1]
    assert "resumed from the checkpoint of step 3" in told[1]
