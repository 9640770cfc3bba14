import dataclasses
import json

import optuna
import pytest
import yaml

from itpn_core.errors import ConfigError
from orchestrator.sweep.front import Objective
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, PRUNED, RUNNING, Trial
from orchestrator.sweep.limits import Limit, parse_limits
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.sampler import make_sampler

MODELS = ("tpe", "nsga2", "gp")
OBJECTIVES = (Objective("accuracy"), Objective("memory", "down"))
SPACE = parse_space(
    yaml.safe_load("""
drops: [0, 1, 2]
layer: {low: 1, high: 6, when: {drops: [1, 2]}}
keep: {low: 0.5, high: 0.95, step: 0.05, when: {drops: [1, 2]}}
second: {low: 2, high: 9, when: {drops: 2}}
lr: {low: 1e-4, high: 1e-2, log: true}
layers: {choices: [[], [0, 1]]}
"""),
    ["layer < second"],
)
SMALL = parse_space({"a": {"choices": [0, 1, 2]}, "b": {"choices": ["x", "y"]}}, ["a < 2"])


def measured(setting):
    """Accuracy and memory that disagree: keeping more is better and larger."""
    keep = setting.get("keep", 1.0)
    return {"accuracy": keep - (setting["lr"] - 3e-3) ** 2, "memory": keep * 10 + len(setting["layers"])}


def run(sampler, count, ends=None):
    """Asks and tells; returns the journal."""
    journal = []
    for _ in range(count):
        trial = sampler.ask()
        state = (ends or {}).get(trial.number, FINISHED)
        values = measured(trial.setting) if state == FINISHED else {}
        sampler.tell(trial.number, state, values)
        # a journal is text: what does not survive JSON is lost
        memo = json.loads(json.dumps(trial.memo))
        journal.append(Trial(trial.number, SPACE.setting(json.loads(trial.setting.key)), state, values, memo))
    return journal


@pytest.mark.parametrize("kind", [*MODELS, "curves", "random"])
def test_proposals_are_legal_new_and_repeatable(kind):
    # a Gaussian process takes a second per question
    count = 6 if kind == "gp" else 14
    first = run(make_sampler(kind, SPACE, OBJECTIVES, seed=5, startup=4), count)
    again = run(make_sampler(kind, SPACE, OBJECTIVES, seed=5, startup=4), count)
    assert first == again
    assert len({trial.setting for trial in first}) == count
    assert [trial.number for trial in first] == list(range(count))
    assert all(SPACE.refusal(trial.setting) == "" for trial in first)
    other = run(make_sampler(kind, SPACE, OBJECTIVES, seed=6, startup=4), count)
    assert first != other


@pytest.mark.parametrize("kind", [*MODELS, "curves", "random"])
def test_a_rebuilt_search_goes_on_as_the_killed_one_would_have(kind):
    ends = {1: FAILED, 3: PRUNED, 5: INFEASIBLE}
    whole = make_sampler(kind, SPACE, OBJECTIVES, seed=1, startup=5)
    journal = run(whole, 8 if kind == "gp" else 16, ends)
    rebuilt = make_sampler(kind, SPACE, OBJECTIVES, seed=1, startup=5, trials=journal[::-1])
    if kind == "gp":
        # its optimiser repeats itself but for the last bits
        (ours,), (theirs,) = run(rebuilt, 1), run(whole, 1)
        assert ours.setting["lr"] == pytest.approx(theirs.setting["lr"], rel=1e-6)
        assert {**ours.setting, "lr": 0} == {**theirs.setting, "lr": 0}
    else:
        assert run(rebuilt, 3) == run(whole, 3)


@pytest.mark.parametrize("kind", ["tpe", "curves", "random"])
def test_trials_that_were_running_keep_their_number_and_can_still_end(kind):
    whole = make_sampler(kind, SPACE, OBJECTIVES, seed=1, startup=4)
    journal = run(whole, 8)
    cut = [whole.ask(), whole.ask()]
    assert [trial.state for trial in cut] == [RUNNING, RUNNING]
    rebuilt = make_sampler(kind, SPACE, OBJECTIVES, seed=1, startup=4, trials=[*journal, *cut])
    for sampler in (whole, rebuilt):
        for trial in cut:
            sampler.tell(trial.number, FINISHED, measured(trial.setting))
    following = run(rebuilt, 3)
    assert following == run(whole, 3)
    assert following[0].number == 10


@pytest.mark.parametrize("kind", MODELS)
def test_optuna_sees_stopped_trials_as_pruned_and_failed_ones_as_failed(kind):
    sampler = make_sampler(kind, SPACE, OBJECTIVES, startup=4)
    ends = {0: PRUNED, 1: FAILED, 2: INFEASIBLE}
    journal = run(sampler, 4, ends)
    rebuilt = make_sampler(kind, SPACE, OBJECTIVES, startup=4, trials=journal)
    for study in (sampler._study, rebuilt._study):
        seen = [t for t in study.get_trials(deepcopy=False) if t.params]
        pruned, infeasible = [t for t in seen if t.state == optuna.trial.TrialState.PRUNED]
        assert pruned.values is None
        assert infeasible.values is None
        assert pruned.constraints == {}
        assert infeasible.constraints == {"fits": 1.0}
        (complete,) = [t for t in seen if t.state == optuna.trial.TrialState.COMPLETE]
        assert complete.values == [journal[3].values["accuracy"], journal[3].values["memory"]]


@pytest.mark.parametrize("kind", MODELS)
def test_limits_reach_the_sampler_as_constraints(kind):
    limits = parse_limits(["memory <= 7", "accuracy >= 0.2"], ["memory", "accuracy"])
    sampler = make_sampler(kind, SPACE, OBJECTIVES, limits=limits, seed=2, startup=6)
    run(sampler, 8 if kind == "gp" else 16)
    complete = [t for t in sampler._study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    for trial in complete:
        accuracy, memory = trial.values
        assert trial.constraints == {
            "memory <= 7": pytest.approx(memory - 7),
            "accuracy >= 0.2": pytest.approx(0.2 - accuracy),
        }


def test_tpe_with_a_limit_goes_where_it_is_kept():
    limits = (Limit("memory", "<=", 7.0),)
    kept = []
    for some in ((), limits):
        journal = run(make_sampler("tpe", SPACE, OBJECTIVES, limits=some, seed=3, startup=12), 32)
        kept.append(sum(trial.values["memory"] <= 7 for trial in journal[12:]))
    assert kept[1] > kept[0]


@pytest.mark.parametrize("kind", [*MODELS, "curves", "random", "grid"])
def test_a_small_space_is_tried_in_full_and_nothing_twice(kind):
    sampler = make_sampler(kind, SMALL, OBJECTIVES, startup=2)
    found = []
    while (trial := sampler.ask()) is not None:
        found.append(trial.setting)
        sampler.tell(trial.number, FINISHED, {"accuracy": float(trial.setting["a"]), "memory": 1.0})
    assert sorted(s.key for s in found) == sorted(s.key for s in SMALL.grid())
    assert sampler.ask() is None


def test_the_grid_goes_on_where_the_journal_ends():
    order = list(SMALL.grid())
    journal = [Trial(number, setting, FINISHED, {}) for number, setting in enumerate(order[:3])]
    assert make_sampler("grid", SMALL, OBJECTIVES, trials=journal).ask() == Trial(3, order[3])


@pytest.mark.parametrize("kind", ["tpe", "curves", "random"])
def test_a_trial_ends_once(kind):
    sampler = make_sampler(kind, SMALL, OBJECTIVES)
    trial = sampler.ask()
    sampler.tell(trial.number, FAILED)
    with pytest.raises(ValueError, match="trial 0 is not running"):
        sampler.tell(trial.number, FINISHED, {"accuracy": 1.0, "memory": 1.0})
    second = sampler.ask()
    with pytest.raises(ValueError, match="a trial ends as one of"):
        sampler.tell(second.number, RUNNING)


def test_tpe_learns_the_front_better_than_chance():
    """On a plain problem, so that a broken translation of values or directions would show."""
    space = parse_space({"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}})
    spread = {}
    for kind in ("tpe", "random"):
        sampler = make_sampler(kind, space, OBJECTIVES, seed=0, startup=10)
        distance = []
        for _ in range(50):
            trial = sampler.ask()
            x, y = trial.setting["x"], trial.setting["y"]
            # the front is y = .2; elsewhere both objectives lose
            sampler.tell(trial.number, FINISHED, {"accuracy": x - abs(y - 0.2), "memory": x + abs(y - 0.2)})
            distance.append(abs(y - 0.2))
        spread[kind] = sum(distance[10:]) / 40
    assert spread["tpe"] < 0.7 * spread["random"]


def test_wrong_words_are_refused():
    with pytest.raises(ConfigError, match=r"sweep.sampler = 'tpa': must be one of curves, tpe, nsga2, gp"):
        make_sampler("tpa", SMALL, OBJECTIVES)
    with pytest.raises(ConfigError, match=r"sweep.limits = 'speed > 3': must read"):
        parse_limits(["speed > 3"], ["speed"])
    with pytest.raises(ConfigError, match=r"no trial measures 'sped'. Did you mean 'speed'"):
        parse_limits(["sped >= 3"], ["speed"])


def test_a_limit_counts_from_its_own_side():
    assert Limit("speed", ">=", 10.0).violation({"speed": 12.0}) == -2.0
    assert Limit("loss", "<=", 0.01).violation({"loss": 0.03}) == pytest.approx(0.02)
    assert dataclasses.astuple(parse_limits(["speed >= 1e2"], ["speed"])[0]) == ("speed", ">=", 100.0)
