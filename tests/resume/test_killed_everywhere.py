"""SIGKILL at every step of twenty, at three places of a step: the losses stay those of the run that nobody killed."""

import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.store import MARKER
from orchestrator.data.folder import Folder
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.step import Step
from tests.support import LocalRun, losses, tiny_config, write_shards

STEPS = 20
WORDS = ("train.max_steps=20", "train.epochs=5", "train.log_every=1", "checkpoint.every_steps=1", "checkpoint.keep=2")


def before_the_step(step):
    return Engine, "step", lambda engine, _: engine.state.step == step


def between_gradient_and_update(step):
    return Step, "_update", lambda step_fn, _: step_fn.state.step == step


def before_the_marker(step):
    """Of the checkpoint after this step, or of a later one: a save that is due while another goes on is left out."""

    def reached(_, key, *__):
        found = re.fullmatch(rf"checkpoints/step-(\d+)/{re.escape(MARKER)}", key)
        return found is not None and int(found[1]) > step

    return Folder, "put", reached


PLACES = (before_the_step, between_gradient_and_update, before_the_marker)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def arm(owner, name, reached):
    """Puts a SIGKILL of this very process in front of a method."""
    real = getattr(owner, name)

    def wrapped(self, *args, **options):
        if reached(self, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **options)

    setattr(owner, name, wrapped)


def attempt(data, storage, number, kill_at):
    """One process of a run; `kill_at` is None for the last."""
    torch.set_num_threads(1)
    if kill_at is not None:
        arm(*PLACES[kill_at % 3](kill_at))
    config = tiny_config(data, Path(storage), *WORDS)
    outcome = train(config, LocalRun(config, attempt=number))
    assert outcome.step == STEPS


def test_killed_at_every_step_of_twenty(data, tmp_path):
    """Each process resumes what the one before left, does at least one step and is killed one step later."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "orchestrator.train.loop"])
    kills = [("killed", number, kill_at) for number, kill_at in enumerate([*range(STEPS), None], start=1)]
    # The undisturbed run has a process of its own too: the number of threads decides the order of sums.
    for name, number, kill_at in [*kills, ("whole", 1, None)]:
        process = context.Process(target=attempt, args=(data, str(tmp_path / name), number, kill_at))
        process.start()
        process.join()
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL), f"{name}, attempt {number}"
    expected = losses(LocalRun(tiny_config(data, tmp_path / "whole", *WORDS)))
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(LocalRun(tiny_config(data, tmp_path / "killed", *WORDS))) == expected
