"""Bad numbers never reach the weights, and collapsed features end a run."""

import json

import pytest
import torch

from itpn_core.errors import CollapseError, UserError
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from orchestrator.train.step import Step
from tests.support import LocalRun, tiny_config, write_shards

BAD_STEP = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def poisoned(monkeypatch):
    """One step whose gradients are not numbers; keeps the weights around it, and its samples."""
    seen = {}
    real, real_step = Step._update, Engine.step

    def update(self, loss):
        if self.state.step == BAD_STEP:
            self._parameters[0].grad.fill_(float("nan"))
            seen["before"] = [p.detach().clone() for p in self._parameters]
            result = real(self, loss)
            seen["after"] = [p.detach().clone() for p in self._parameters]
            return result
        return real(self, loss)

    def step(self, batch):
        if self.state.step == BAD_STEP:
            seen["ids"] = batch.ids[batch.own].tolist()
        real_step(self, batch)

    monkeypatch.setattr(Step, "_update", update)
    monkeypatch.setattr(Engine, "step", step)
    return seen


def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_weights(data, tmp_path, poisoned):
    config = tiny_config(data, tmp_path)
    run = LocalRun(config)
    with pytest.raises(UserError, match=r"not finite or spiked at step 3 .*skip_budget=0.*guard/step-00000003\.json"):
        train(config, run)
    assert all(torch.equal(a, b) for a, b in zip(poisoned["before"], poisoned["after"], strict=True))
    (kept,) = (run.directory / "guard").iterdir()
    assert kept.name == "step-00000003.json"
    assert json.loads(kept.read_text())["samples"] == poisoned["ids"]
    assert len(poisoned["ids"]) == config.train.global_batch


def test_a_budget_lets_the_run_go_on_and_is_part_of_the_state(data, tmp_path, poisoned):
    config = tiny_config(data, tmp_path, "train.guard.skip_budget=1")
    outcome = train(config, LocalRun(config))
    assert outcome.step == 8
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        assert engine.state.skipped == [BAD_STEP]


COLLAPSING = [
    "objective.ema_momentum=0", "objective.ema_momentum_end=0", "objective.ema_predictor=false",
    "objective.target_norm=none", "train.optimizer.lr=1e-2", "train.epochs=100", "train.max_steps=200",
    "objective.guard_steps=25", "checkpoint.every_epochs=0", "train.log_every=25",
]  # fmt: skip


def test_a_student_that_copies_itself_collapses_and_is_stopped(data, tmp_path):
    config = tiny_config(data, tmp_path, *COLLAPSING)
    with pytest.raises(CollapseError, match=r"have collapsed: .* \(objective.ema_predictor=true\)"):
        train(config, LocalRun(config))
