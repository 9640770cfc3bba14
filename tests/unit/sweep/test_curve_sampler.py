"""The queue that a model of the curves orders: repeatable, an order only, and sound at the borders of what may come."""

import functools
import json
import math

import numpy as np
import pytest
import yaml

from orchestrator.sweep.front import Objective
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, PRUNED, RUNNING, Trial
from orchestrator.sweep.limits import parse_limits
from orchestrator.sweep.queue import Queue, resting_rungs
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.sampler import make_sampler

GOALS = (Objective("accuracy"), Objective("gflops", "down"))
LENGTH = 8
REST = resting_rungs(LENGTH)[0] + 1
TEXT = """
drops: [0, 1, 2]
keep: {choices: [0.5, 0.6, 0.7, 0.8, 0.9], when: {drops: [1, 2]}}
second: {low: 1, high: 4, when: {drops: 2}}
kind: [a, b]
"""
SPACE = parse_space(yaml.safe_load(TEXT))
ENDLESS = parse_space(yaml.safe_load(TEXT + "lr: {low: 1e-4, high: 1e-2, log: true}"))


def values(setting, rung):
    """After a rung, counted from 1: dropping tokens is cheap and costs accuracy, more so with kind b."""
    dropped = setting["drops"] * (1 - setting.get("keep", 1.0))
    accuracy = 0.8 - 0.3 * dropped**2 - 0.1 * (setting["kind"] == "b") - 0.2 * rung**-0.5
    return {"accuracy": accuracy, "gflops": 10 - 4 * dropped}


class Sweep:
    """Trains one piece after the other, as the driver does."""

    def __init__(self, space=SPACE, goals=GOALS, budget=0.0, trials=(), curves=None, measure=values, **words):
        self.measure = measure
        self.sampler = make_sampler("curves", space, goals, startup=5, trials=trials, **words)
        self.queue, self.trials = Queue(goals, LENGTH, budget), {trial.number: trial for trial in trials}
        self.curves = curves if curves is not None else {}
        self.resting = {n for n, t in self.trials.items() if t.state == RUNNING}
        self.ended = {n for n, t in self.trials.items() if t.state != RUNNING}
        self.turns = []

    def turn(self, more=True):
        return self.queue.turn(self.curves, self.resting, self.ended, more, self.sampler)

    def step(self, more=True, ends=None):
        number = self.turn(more)
        if number is None:
            trial = self.sampler.ask() if more else None
            if trial is None:
                return False
            number = trial.number
            self.trials[number], self.curves[number] = trial, []
        self.resting.discard(number)
        setting, begun, self.turns = self.trials[number].setting, len(self.curves[number]), [*self.turns, number]
        for rung in range(begun, LENGTH if begun else REST):
            self.curves[number] = [*self.curves[number], self.measure(setting, rung + 1)]
        state = (ends or {}).get(number, FINISHED if begun else RUNNING)
        if state == RUNNING:
            self.resting.add(number)
            return True
        last = self.curves[number][-1] if state == FINISHED else {}
        self.trials[number] = Trial(number, setting, state, last)
        self.ended.add(number)
        self.sampler.tell(number, state, last)
        return True

    def steps(self, count, **words):
        for _ in range(count):
            self.step(**words)
        return self


@pytest.mark.parametrize("space", [SPACE, ENDLESS], ids=["countable", "endless"])
def test_the_same_trials_give_the_same_turns_and_a_restart_changes_nothing(space):
    ends = {1: FAILED, 3: PRUNED, 6: INFEASIBLE}
    whole = Sweep(space, seed=3).steps(14, ends=ends)
    assert Sweep(space, seed=3).steps(14, ends=ends).turns == whole.turns
    # the journal is text
    known = [
        Trial(n, space.setting(json.loads(t.setting.key)), t.state, t.values) for n, t in sorted(whole.trials.items())
    ]
    again = Sweep(space, seed=3, trials=known[::-1], curves=json.loads(json.dumps(whole.curves), object_hook=_numbers))
    assert again.resting == whole.resting
    for sweep in (whole, again):
        sweep.turns = []
        sweep.steps(4)
    assert again.turns == whole.turns
    assert {n: t.setting for n, t in again.trials.items()} == {n: t.setting for n, t in whole.trials.items()}


def _numbers(found):
    return {int(name) if name.isdigit() else name: value for name, value in found.items()}


def test_it_orders_and_never_stops():
    sweep = Sweep().steps(25)
    # nothing that it was shown has changed, and every trial that rests is still there
    assert sweep.ended == {n for n, curve in sweep.curves.items() if len(curve) == LENGTH}
    assert sweep.resting == set(sweep.curves) - sweep.ended
    resting = len(sweep.resting)
    assert resting
    for _ in range(resting):
        assert sweep.turn(more=False) in sweep.resting
        assert sweep.step(more=False)
    assert sweep.turn(more=False) is None
    assert sweep.ended == set(sweep.trials)


def test_first_come_random_settings_that_rest_and_then_the_promising_go_on():
    sweep = Sweep().steps(5)
    assert sweep.turns == [0, 1, 2, 3, 4]
    sweep.steps(20)
    finished = [sweep.trials[n].setting for n in sweep.ended]
    assert len(finished) >= 5
    # kind b is worse and no cheaper; dropping twice and keeping half is the cheap end
    assert sum(setting["kind"] == "a" for setting in finished) >= 0.8 * len(finished)
    assert max(2 * (1 - s["keep"]) for s in finished if s["drops"] == 2) == pytest.approx(1.0)


def test_what_the_budget_cannot_finish_comes_last():
    sweep = Sweep().steps(8)
    spent = sum(len(curve) for curve in sweep.curves.values()) / LENGTH
    able = Sweep(budget=spent + (LENGTH - REST) / LENGTH).steps(8)
    # a new setting would cost a whole training: only those that rest can still be finished
    assert able.turn() in able.resting


@pytest.mark.parametrize("goals", [GOALS[:1], (*GOALS, Objective("memory", "down"))], ids=["one", "three"])
def test_any_number_of_objectives(goals):
    sweep = Sweep(goals=goals, measure=lambda s, rung: {**values(s, rung), "memory": 1.0 + s["drops"]}).steps(16)
    best = max(sweep.curves[n][-1]["accuracy"] for n in sweep.ended)
    assert best == pytest.approx(values(SPACE.setting({"drops": 0, "kind": "a"}), LENGTH)["accuracy"], abs=0.02)


def test_settings_that_break_a_limit_wait():
    limits = parse_limits(["gflops <= 8"], ["gflops", "accuracy"])
    kept = []
    for some in ((), limits):
        sweep = Sweep(limits=some).steps(20)
        kept.append(np.mean([sweep.curves[n][-1]["gflops"] <= 8 for n in sweep.ended]))
    assert kept[1] > kept[0]
    assert kept[1] >= 0.7


def test_it_learns_what_does_not_fit_into_memory():
    sampler, found = make_sampler("curves", SPACE, GOALS, startup=8), []
    for _ in range(20):
        trial = sampler.ask()
        found.append(trial.setting["kind"])
        # the kind that it would want
        state = INFEASIBLE if trial.setting["kind"] == "a" else FINISHED
        sampler.tell(trial.number, state, values(trial.setting, LENGTH) if state == FINISHED else {})
    assert "a" in found[:8]
    assert found[8:].count("a") <= 3


def test_without_a_queue_it_learns_from_ends():
    sampler = make_sampler("curves", SPACE, GOALS, startup=5)
    found = []
    for _ in range(20):
        trial = sampler.ask()
        found.append(trial.setting)
        sampler.tell(trial.number, FINISHED, values(trial.setting, LENGTH))
    assert len(set(found)) == 20
    assert np.mean([setting["kind"] == "a" for setting in found[5:]]) > 0.6


def test_a_space_is_tried_in_full_and_nothing_twice():
    small = parse_space({"a": {"choices": [0, 1, 2]}, "b": {"choices": ["x", "y"]}})
    sampler, found = make_sampler("curves", small, GOALS, startup=2), []
    while (trial := sampler.ask()) is not None:
        found.append(trial.setting)
        sampler.tell(trial.number, FINISHED, {"accuracy": float(trial.setting["a"]), "gflops": 1.0})
    assert sorted(s.key for s in found) == sorted(s.key for s in small.grid())


def test_trials_that_run_at_the_same_time_are_counted_on():
    sampler = make_sampler("curves", SPACE, GOALS, startup=3)
    for _ in range(6):
        trial = sampler.ask()
        sampler.tell(trial.number, FINISHED, values(trial.setting, LENGTH))
    settings = [sampler.ask().setting for _ in range(4)]
    assert len(set(settings)) == 4


def test_with_no_data_those_that_rest_have_their_turn():
    sampler = make_sampler("curves", SPACE, GOALS, startup=1)
    first = sampler.ask()
    turn = functools.partial(sampler.turn, {first.number: []}, {first.number}, LENGTH, left=math.inf)
    assert turn(more=True) is None
    assert turn(more=False) == first.number
