"""Trials in training take turns: who goes on, and what a restart or a budget changes."""

import functools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.folder import Folder
from orchestrator.sweep.front import Objective
from orchestrator.sweep.journal import TrialJournal
from orchestrator.sweep.known import FINISHED
from orchestrator.sweep.queue import FACTOR, Queue, Standing, expected_end, resting_rungs, turn
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.sampler import make_sampler
from orchestrator.sweep.state import SweepState, measured, run_trial

GOALS = (Objective("accuracy"), Objective("gflops", "down"))
SPACE = parse_space({"model.a": {"low": 0, "high": 9}, "model.b": {"low": 0, "high": 9}})
LENGTH = 5


def standing(number, values, waiting=True):
    return Standing(number, np.array(values, dtype=float), waiting, ended=not waiting)


def test_trials_rest_between_evaluations_but_never_at_the_last_one():
    assert resting_rungs(0) == resting_rungs(1) == []
    for length in range(2, 40):
        found = resting_rungs(length)
        assert found == sorted(set(found))
        assert 0 <= found[0] <= found[-1] < length - 1


def test_the_best_of_enough_trials_goes_on_and_the_others_wait():
    rest = resting_rungs(LENGTH)[0]
    waiting = [standing(n, [[n, 0]] * (rest + 1)) for n in range(FACTOR)]
    assert turn(waiting[1:], LENGTH, more=True) is None
    assert turn(waiting, LENGTH, more=True) == FACTOR - 1
    gone = [*waiting[:-1], standing(FACTOR - 1, [[FACTOR - 1, 0]] * (rest + 2), waiting=False)]
    assert turn(gone, LENGTH, more=True) is None
    # nothing new is left: now the others may
    assert turn(gone, LENGTH, more=False) == FACTOR - 2


def test_of_equal_ranks_the_one_that_adds_most_goes_on():
    rest = resting_rungs(LENGTH)[0]
    gone = [standing(90 + n, [point] * LENGTH, waiting=False) for n, point in enumerate([(0, 9), (8, 1)])]
    waiting = [standing(n, [point] * (rest + 1)) for n, point in enumerate([(0.5, 8.9), (5, 6), (9, 0.5), (4, 5)])]
    assert turn([*gone, *waiting], LENGTH, more=False) == 1


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, LENGTH), st.booleans()), max_size=24),
    st.booleans(),
)
def test_only_a_resting_trial_gets_a_turn_and_one_always_does_when_nothing_new_is_left(rows, more):
    standings = [standing(n, [[x, y]] * length, waiting) for n, (x, y, length, waiting) in enumerate(rows)]
    found = turn(standings, LENGTH, more)
    able = [s.number for s in standings if s.waiting and len(s.curve) - 1 in resting_rungs(LENGTH)]
    assert found is None or found in able
    if able and not more:
        assert found is not None


def test_a_resting_trial_is_expected_to_gain_what_others_did():
    finished = [np.array([[0.2, -1.0], [0.3 + gain, -1.0]]) for gain in (0.0, 0.1, 0.5)]
    assert expected_end(np.array([[0.1, -2.0]]), finished).tolist() == [0.1 + 0.2, -2.0]
    assert expected_end(np.array([[0.1, -2.0]]), []).tolist() == [0.1, -2.0]


def open_state(root, *, trials=30, budget=0.0, kind="random"):
    make = functools.partial(make_sampler, kind, SPACE, GOALS, seed=1, startup=4)
    return SweepState(
        TrialJournal(Folder(str(root))), SPACE, lambda known: make(trials=known), trials, 0,
        Queue(GOALS, LENGTH, budget),
    )  # fmt: skip


def train(journal, trial):
    """A piece of training, as `train_setting` does it: to the next rest or to the end."""
    begun = len(journal.curve(trial.number))
    for rung in range(begun, LENGTH):
        values = {"accuracy": float(trial.setting["model.a"] + rung), "gflops": float(trial.setting["model.b"])}
        journal.rung(trial.number, rung + 1, values)
        if rung in resting_rungs(LENGTH):
            return None
    return measured(FINISHED, values, {}, time.time())


def drive(state, pieces=10**6):
    """Runs some pieces; returns the trials in the order of their turns."""
    turns = []
    while len(turns) < pieces and (trial := state.next()) is not None:
        turns.append(trial.number)
        end = run_trial(state.journal, trial, functools.partial(train, state.journal), 0)
        state.rest(trial.number) if end is None else state.close(trial.number)
    return turns


@pytest.mark.parametrize(("kind", "trials"), [("random", 30), ("curves", 12)])
def test_every_trial_ends_and_a_restart_goes_on_as_the_whole_sweep(tmp_path, kind, trials):
    whole = open_state(tmp_path / "whole", kind=kind, trials=trials)
    turns = drive(whole)
    assert sorted(set(turns)) == list(range(trials))
    assert len(whole.ends) == trials
    assert whole.left == 0
    pieces, killed = [], tmp_path / "killed"
    while len(pieces) < len(turns):
        # every seven pieces another driver, which knows what the journal says
        pieces += drive(open_state(killed, kind=kind, trials=trials), 7)
    assert pieces == turns
    assert {n: end.values for n, end in open_state(killed, kind=kind, trials=trials).ends.items()} == {
        n: end.values for n, end in whole.ends.items()
    }


def test_a_space_that_is_used_up_leaves_nobody_resting(tmp_path):
    small = parse_space({"model.a": {"low": 0, "high": 1}, "model.b": {"low": 0, "high": 1}})
    state = SweepState(
        TrialJournal(Folder(str(tmp_path))), small, lambda known: make_sampler("random", small, GOALS, trials=known),
        30, 0, Queue(GOALS, LENGTH),
    )  # fmt: skip
    drive(state)
    assert sorted(state.ends) == [0, 1, 2, 3]
    assert (state.left, state.resting) == (0, 0)


def test_better_ranks_finish_first(tmp_path):
    state = open_state(tmp_path, trials=40, budget=16.0)
    drive(state)
    settings = {number: state.trials[number].setting for number in state.trials}
    finished = [settings[n]["model.a"] - settings[n]["model.b"] for n in state.ends]
    others = [settings[n]["model.a"] - settings[n]["model.b"] for n in settings if n not in state.ends]
    assert len(finished) >= 3
    assert np.mean(finished) > np.mean(others)


def test_a_spent_budget_leaves_what_rests_and_a_larger_one_goes_on(tmp_path):
    state = open_state(tmp_path, budget=4.0)
    drive(state)
    assert state.left == 0
    assert state.resting > 0
    spent = sum(len(state.journal.curve(n)) for n in state.trials) / LENGTH
    assert 4.0 <= spent < 5.0
    more = open_state(tmp_path, budget=8.0)
    assert more.left > 0
    assert len(drive(more)) > 0
