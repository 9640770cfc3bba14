"""Ranks that hold a part of every parameter compute what ranks that hold all of them do."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrator.checkpoint.source import open_source, student_state
from orchestrator.checkpoint.store import MARKER, CheckpointStore
from orchestrator.config.identity import result_fields
from orchestrator.data.folder import Folder
from orchestrator.launch.record import RunRecord
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.step import Step
from tests.distributed.test_world_sizes import (
    STEPS,
    WORDS,
    Recording,
    assert_same_gradients,
    assert_same_masks,
    assert_same_run,
    run_steps,
    run_world,
)
from tests.support import LocalRun, losses, tiny_config, write_shards

AVERAGE = "train.optimizer.average_decay=0.9"
SHARD = ("train.parallel=shard", AVERAGE)
HYBRID = ("train.parallel=hybrid", "train.shard_ranks=2", AVERAGE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"), per_class=27)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run on one rank, its state at the end, and the weights that it exports."""
    config = tiny_config(data, tmp_path_factory.mktemp("one"), *WORDS, AVERAGE, "checkpoint.every_steps=100")
    seen, run = run_steps(config, 0, 1), LocalRun(config)
    assert train(config, run).step == STEPS  # all are done: what is left is the export
    return seen, CheckpointStore(run.folder, keep=1).load_newest(), run.directory / "final" / "backbone.safetensors"


def assert_same_state(place, expected):
    """Weights, moving-average teacher, averages and moments of the last checkpoint, read whole."""
    found = CheckpointStore(Folder(f"{place}/tiny"), keep=1).load_newest()
    assert found.step == expected.step
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert torch.allclose(found.tensors[name].double(), value.double(), rtol=1e-6, atol=1e-9), name
    averaged, student = student_state(found.tensors, str(place))  # what jobs/export.py takes
    assert averaged
    assert student["patch_embed.proj.weight"].shape == expected.tensors["task/student.patch_embed.proj.weight"].shape


def test_two_ranks_with_half_of_the_model_each(data, alone, tmp_path):
    words = (*SHARD, "checkpoint.every_steps=100", "train.micro_batch=5")
    found = run_world(2, 29641, data, tmp_path / "w", *words)
    assert_same_run(found, alone[0])
    assert_same_state(tmp_path / "w", alone[1])
    assert_same_weights(tiny_config(data, tmp_path / "w", *WORDS, *words), alone[2])


def assert_same_weights(config, exported):
    """What every job reads of a run that left only its checkpoint, in parts, and what one rank exports."""
    run, expected = LocalRun(config), open_source(str(exported))
    RunRecord(run.run_uid, result_fields(config, "")).save(run.folder)
    assert not (run.directory / "final").exists()
    found = open_source(str(run.directory))
    assert (found.step, found.model, found.facts["weights"]) == (STEPS, expected.model, "moving average")
    assert expected.state
    for name, value in expected.state.items():
        assert found.state[name].dtype == value.dtype
        assert torch.allclose(found.state[name], value, rtol=1e-6, atol=1e-9), name


@pytest.mark.long
def test_compiled_blocks_of_parts_agree_with_eager_ones(data, alone, tmp_path):
    """`aot_eager` traces as the default backend does, and leaves out the code generator."""
    words = (*SHARD, "train.compile=true", "train.compile_backend=aot_eager")
    found = run_world(2, 29646, data, tmp_path / "w", *words, last=6)
    assert found.losses == pytest.approx(alone[0].losses[:6], rel=1e-8)
    assert_same_gradients(found.gradients, alone[0].gradients)


@pytest.mark.long
@pytest.mark.parametrize(
    ("port", "words"),
    [(29647, ("train.precision=bf16",)), (29648, ("train.precision=fp16", "train.loss_scale=16777216"))],
    ids=["bf16", "fp16"],
)
def test_reduced_formats_in_parts_stay_near_whole_ones(data, tmp_path, port, words):
    """The first loss scale is too large on purpose: all ranks must find the same one."""
    whole = run_world(2, port, data, tmp_path / "whole", AVERAGE, *words, last=8).losses
    parts = run_world(2, port + 2, data, tmp_path / "parts", *SHARD, *words, last=8).losses
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "port", "words"),
    [(4, 29642, SHARD), (4, 29643, HYBRID), (3, 29644, SHARD), (2, 29645, (*SHARD, "train.grad_checkpointing=true"))],
    ids=["shard-4", "hybrid-2x2", "shard-3", "recomputing"],
)
def test_other_groups_agree(data, alone, tmp_path, world, port, words):
    assert_same_run(run_world(world, port, data, tmp_path / "w", *words), alone[0])


@pytest.mark.long
def test_resized_from_parts_to_other_parts(data, alone, tmp_path):
    """4 -> 2 -> 3 ranks; in between one that holds everything, and two copies of two parts."""
    place, save = tmp_path / "resized", "checkpoint.every_steps=100"
    seen = Recording()
    groups = [
        (4, 0, 5, SHARD), (2, 5, 9, SHARD), (3, 9, 13, SHARD), (2, 13, 15, (AVERAGE,)), (4, 15, STEPS, HYBRID)
    ]  # fmt: skip
    for port, (world, first, last, words) in enumerate(groups, start=29651):
        part = run_world(world, port, data, place, *words, save, first=first, last=last)
        seen.ids += part.ids
        seen.masks += part.masks
        seen.losses += part.losses
    assert seen.ids == alone[0].ids
    assert_same_masks(seen.masks, alone[0].masks)
    assert seen.losses == pytest.approx(alone[0].losses, rel=1e-8)
    assert_same_state(place, alone[1])


def before_the_step(step):
    return 1, Engine, "step", lambda engine, _: engine.state.step == step


def between_gradient_and_update(step):
    return 0, Step, "_update", lambda step_fn, _: step_fn.state.step == step


def saved_step(key):
    """Of which step a checkpoint's object is; -1 for any other object."""
    return int(key.split("/")[1].removeprefix("step-")) if key.startswith("checkpoints/step-") else -1


def before_a_part(step):
    return 1, Folder, "put", lambda _, key, *__: saved_step(key) > step


def before_the_marker(step):
    return 0, Folder, "put", lambda _, key, *__: saved_step(key) > step and key.endswith(MARKER)


PLACES = (before_the_step, between_gradient_and_update, before_a_part, before_the_marker)
KILLED_STEPS = 8


def killed_config(data, storage):
    steps = (f"train.max_steps={KILLED_STEPS}", "train.epochs=3", "train.log_every=1", "checkpoint.every_steps=1")
    return tiny_config(data, Path(storage), *steps, *SHARD)


def attempt(rank, port, data, storage, number, kill_at):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if kill_at is not None:
        victim, owner, name, reached = PLACES[kill_at % len(PLACES)](kill_at)
        if victim == rank:
            arm(owner, name, reached)
    config = killed_config(data, storage)
    train(config, LocalRun(config, rank, 2, number))
    os._exit(0)  # the other rank may be gone: nothing to take leave of


def arm(owner, name, reached):
    """Puts a SIGKILL of this very process in front of a method."""
    real = getattr(owner, name)

    def wrapped(self, *args, **options):
        if reached(self, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **options)

    setattr(owner, name, wrapped)


@pytest.mark.long
def test_a_rank_killed_at_every_step(data, tmp_path):
    """In turn before a step, before an update, before its part is on storage and before the commit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    kills = [("killed", number, kill_at) for number, kill_at in enumerate([*range(KILLED_STEPS), None], start=1)]
    for name, number, kill_at in [*kills, ("whole", 1, None)]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (port, data, str(tmp_path / name), number, kill_at)
        group = [context.Process(target=attempt, args=(rank, *arguments)) for rank in (0, 1)]
        for process in group:
            process.start()
        victim = None if kill_at is None else PLACES[kill_at % len(PLACES)](kill_at)[0]
        for rank in (0, 1) if victim is None else (victim,):
            group[rank].join(120)
            assert group[rank].exitcode == (0 if victim is None else -signal.SIGKILL), f"{name}, attempt {number}"
        for process in group:
            process.kill()
            process.join()
    expected = losses(LocalRun(killed_config(data, tmp_path / "whole")))
    assert sorted(expected) == list(range(1, KILLED_STEPS + 1))
    assert losses(LocalRun(killed_config(data, tmp_path / "killed"))) == expected
