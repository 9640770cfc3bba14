"""Gradients that are finite but far too large never reach the weights; and saves that come by the clock."""

import json
from types import SimpleNamespace

import pytest
import torch

from itpn_core.errors import UserError
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.train import engine as engine_module
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.saving import Saver
from orchestrator.train.step import Step
from tests.support import LocalRun, losses, tiny_config, write_shards

SPIKE = 1e4
SPIKES = (5, 7)
"""Steps of the second epoch of four; the window of three steps is read later than they are done."""
GUARD = ("train.guard.spike_factor=10", "train.epochs=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def held(step):
    """What a refused step must leave as it is: weights, moments, and the mean that spikes are measured by."""
    optimizer = step.state.optimizer
    moments = [optimizer.state[p][name] for p in step._parameters for name in ("exp_avg", "exp_avg_sq", "step")]
    return [
        t.detach().clone()
        for t in (*step._parameters, *moments, step.state.grad_norm_mean, step.state.loss_history.tensor)
    ]


@pytest.fixture
def seen(monkeypatch):
    """Makes the gradients of two steps far too large; keeps the state around them, and all sample ids."""
    seen = SimpleNamespace(before={}, after={}, ids={}, norms={})
    real_update, real_step = Step._update, Engine.step

    def update(self, loss):
        number = self.state.step
        if number not in SPIKES:
            return real_update(self, loss)
        for parameter in self._parameters:
            parameter.grad.mul_(SPIKE)
        seen.before[number] = held(self)
        values = real_update(self, loss)
        seen.after[number], seen.norms[number] = held(self), float(values["grad_norm"])
        return values

    def step(self, batch):
        seen.ids[self.state.step] = batch.ids[batch.own].tolist()
        real_step(self, batch)

    monkeypatch.setattr(Step, "_update", update)
    monkeypatch.setattr(Engine, "step", step)
    return seen


def unchanged(seen, number):
    return all(torch.equal(a, b) for a, b in zip(seen.before[number], seen.after[number], strict=True))


def kept(run):
    return {path.name: json.loads(path.read_text()) for path in (run.directory / "guard").glob("*.json")}


def test_a_spike_ends_the_run_before_the_weights_and_names_its_samples(data, tmp_path, seen):
    config = tiny_config(data, tmp_path, *GUARD)
    run = LocalRun(config)
    with pytest.raises(UserError, match=r"not finite or spiked at step 5 .*skip_budget=0.*guard/step-00000005\.json"):
        train(config, run)
    assert torch.isfinite(torch.tensor(seen.norms[5]))
    assert unchanged(seen, 5)
    found = kept(run)
    assert list(found) == ["step-00000005.json"]
    assert found["step-00000005.json"]["samples"] == seen.ids[5]
    assert seen.ids[5] != seen.ids[1], "another epoch has another order"
    assert float(found["step-00000005.json"]["values"]["grad_norm"]) == pytest.approx(seen.norms[5])


def test_without_the_guard_a_spike_changes_the_weights(data, tmp_path, seen):
    config = tiny_config(data, tmp_path, "train.epochs=3")
    assert train(config, LocalRun(config)).step == 12
    assert not unchanged(seen, 5)
    assert kept(LocalRun(config)) == {}


def test_the_budget_counts_over_restarts(data, tmp_path, seen):
    """One spike is within the budget; the second, after a restart, is not."""
    config = tiny_config(data, tmp_path, *GUARD, "train.guard.skip_budget=1", "train.log_every=1")
    first = LocalRun(config)
    first.stop_after = 5
    assert train(config, first).step == 6
    second = LocalRun(config, attempt=2)
    with pytest.raises(UserError, match=r"spiked at step 7 \(in all at steps \[5, 7\]\).*skip_budget=1"):
        train(config, second)
    assert unchanged(seen, 5)
    assert unchanged(seen, 7)
    assert {name: value["samples"] for name, value in kept(second).items()} == {
        f"step-{number:08d}.json": seen.ids[number] for number in SPIKES
    }


def test_a_budget_for_both_lets_the_run_end(data, tmp_path, seen):
    config = tiny_config(data, tmp_path, *GUARD, "train.guard.skip_budget=2")
    run = LocalRun(config)
    assert train(config, run).step == 12
    assert sorted(losses(run)) == list(range(1, 13)), "a refused step has its place in the curve"
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        assert engine.state.skipped == list(SPIKES)


def test_a_gradient_below_the_factor_passes(data, tmp_path, seen):
    config = tiny_config(data, tmp_path, f"train.guard.spike_factor={100 * SPIKE}", "train.epochs=3")
    assert train(config, LocalRun(config)).step == 12
    assert not unchanged(seen, 5)


@pytest.mark.parametrize(("minutes", "expected"), [(2, [3, 6, 9, 12, 15, 16]), (0, [16])])
def test_saves_come_by_the_clock(data, tmp_path, monkeypatch, minutes, expected):
    """Each step takes a minute; saved when the last save is more than two minutes old, and at the end."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(engine_module, "Saver", lambda *a, **k: Saver(*a, **k, clock=lambda: now.seconds))
    real = Engine.step

    def step(self, batch):
        self.checkpoints.wait()  # a save that is due waits for the one before
        now.seconds += 60
        real(self, batch)

    monkeypatch.setattr(Engine, "step", step)
    words = ("train.epochs=4", "train.log_every=1", "checkpoint.every_epochs=0", "checkpoint.keep=9")
    config = tiny_config(data, tmp_path, *words, f"checkpoint.every_minutes={minutes}")
    run = LocalRun(config)
    assert train(config, run).step == 16
    assert CheckpointStore(run.folder, keep=9).steps() == expected


def test_a_save_by_steps_comes_once_for_each_multiple(data, tmp_path, monkeypatch):
    """Windows of 3 in epochs of 4: the first look after a multiple of 3 saves, and the next look does not again."""
    real = Engine.step

    def step(self, batch):
        self.checkpoints.wait()
        real(self, batch)

    monkeypatch.setattr(Engine, "step", step)
    words = ("train.epochs=4", "train.log_every=3", "checkpoint.every_epochs=0", "checkpoint.keep=9")
    config = tiny_config(data, tmp_path, *words, "checkpoint.every_steps=5", "checkpoint.every_minutes=0")
    run = LocalRun(config)
    assert train(config, run).step == 16
    # looked at 3 4 7 8 11 12 15 16
    assert CheckpointStore(run.folder, keep=9).steps() == [7, 11, 15, 16]


LOSS_GUARD = ("train.guard.loss_sigma=8", "train.epochs=8", "train.guard.skip_budget=1")
LOSS_SPIKE = 25
"""After the guard's warm-up of 20 steps; of 32."""


@pytest.fixture
def spiked_loss(monkeypatch):
    """One step whose loss is far too high while its gradient is as ever; keeps the state around it."""
    seen, real = SimpleNamespace(before={}, after={}), Step._update

    def update(self, loss):
        number = self.state.step
        if number != LOSS_SPIKE:
            return real(self, loss)
        seen.before[number] = held(self)
        values = real(self, loss + 100)
        seen.after[number] = held(self)
        return values

    monkeypatch.setattr(Step, "_update", update)
    return seen


def test_a_loss_that_spikes_is_left_out_and_counts_against_the_budget(data, tmp_path, spiked_loss):
    config = tiny_config(data, tmp_path, *LOSS_GUARD)
    run = LocalRun(config)
    assert train(config, run).step == 32
    assert unchanged(spiked_loss, LOSS_SPIKE)
    assert list(kept(run)) == ["step-00000025.json"]


def test_a_loss_that_spikes_without_a_budget_ends_the_run(data, tmp_path, spiked_loss):
    config = tiny_config(data, tmp_path, *LOSS_GUARD, "train.guard.skip_budget=0")
    with pytest.raises(UserError, match="the gradient or the loss was not finite or spiked at step 25"):
        train(config, LocalRun(config))
    assert unchanged(spiked_loss, LOSS_SPIKE)


def test_without_the_loss_guard_nothing_is_left_out(data, tmp_path, spiked_loss):
    config = tiny_config(data, tmp_path, "train.epochs=8")
    assert train(config, LocalRun(config)).step == 32
    assert not unchanged(spiked_loss, LOSS_SPIKE)


def test_what_the_loss_guard_knows_survives_a_stop(data, tmp_path, spiked_loss):
    words = (*LOSS_GUARD, "train.log_every=1")
    whole = LocalRun(tiny_config(data, tmp_path / "whole", *words))
    config = tiny_config(data, tmp_path / "whole", *words)
    train(config, whole)
    config = tiny_config(data, tmp_path / "cut", *words)
    first = LocalRun(config)
    first.stop_after = 22
    assert train(config, first).stopped == "test"
    second = LocalRun(config, attempt=2)
    assert train(config, second).step == 32
    assert losses(second) == losses(whole)
    assert list(kept(second)) == ["step-00000025.json"]
