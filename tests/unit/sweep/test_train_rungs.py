"""Training trials: their rungs in the journal, when one is asked to stop, and what such a sweep refuses."""

from dataclasses import replace

import pytest

from itpn_core.errors import ConfigError
from orchestrator.config.load import load
from orchestrator.config.tree import SweepJobConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.config import ClusterConfig
from orchestrator.sweep.config import SweepConfig
from orchestrator.sweep.front import gains
from orchestrator.sweep.job import best_settings, open_space
from orchestrator.sweep.journal import End, TrialJournal, trial_uid
from orchestrator.sweep.known import FINISHED, PRUNED, Trial
from orchestrator.sweep.pruning import MIN_FINISHED
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.results import Point, Results
from orchestrator.sweep.train import (
    BEATEN,
    SHARE,
    _to_its_end,
    beaten,
    check_train,
    trial_config,
    worker_resources,
)

SWEEP = SweepConfig(objectives=("accuracy", "gflops"), mode="train")
SPACE = parse_space({"model.gathering.window": {"choices": [0, 2, 7]}})


def curve(first, last, gflops=1.0, rungs=3):
    step = (last - first) / (rungs - 1)
    return [{"accuracy": first + step * rung, "gflops": gflops} for rung in range(rungs)]


def test_a_trial_stops_only_when_enough_have_finished_and_its_optimistic_bound_is_dominated():
    curves = [curve(0.5, 0.7 + 0.01 * n) for n in range(MIN_FINISHED)]
    hopeless, hopeful, cheap = (
        {"accuracy": 0.3, "gflops": 1.0}, {"accuracy": 0.51, "gflops": 1.0}, {"accuracy": 0.3, "gflops": 0.9}
    )  # fmt: skip
    assert beaten(hopeless, 0, curves, SWEEP)
    assert not beaten(hopeful, 0, curves, SWEEP)
    assert not beaten(cheap, 0, curves, SWEEP), "nothing on the front is as cheap"
    assert not beaten(hopeless, 0, curves[:-1], SWEEP), "too few have finished"
    assert not beaten(hopeless, 2, curves, SWEEP), "at its last rung it has finished"


def test_rungs_are_kept_once_and_in_order_whatever_is_evaluated_again(tmp_path):
    journal = TrialJournal(Folder(str(tmp_path)))
    trial = Trial(3, SPACE.draw(0, 0))
    journal.asked(trial)
    assert journal.rung(3, 20, {"accuracy": 0.2, "gflops": 1.0}) == 0
    assert journal.rung(3, 100, {"accuracy": 0.3, "gflops": 1.0}) == 1
    assert journal.rung(3, 20, {"accuracy": 0.9, "gflops": 1.0}) == 0
    assert [values["accuracy"] for values in journal.curve(3)] == [0.2, 0.3]
    assert journal.finished_curves() == []
    journal.ended(3, End(PRUNED, {"accuracy": 0.3, "gflops": 1.0}))
    assert journal.finished_curves() == []
    other = Trial(4, SPACE.draw(0, 1))
    journal.asked(other)
    journal.rung(4, 20, {"accuracy": 0.4, "gflops": 1.0})
    journal.ended(4, End(FINISHED, {"accuracy": 0.4, "gflops": 1.0}))
    assert journal.finished_curves() == [[{"accuracy": 0.4, "gflops": 1.0}]]


def config(*words):
    return load(SweepJobConfig, None, ["sweep.mode=train", "sweep.objectives=[accuracy,gflops]", *words])


def test_a_trial_is_a_run_of_its_own_with_its_fields(tmp_path):
    trial = Trial(12, SPACE.setting({"model.gathering.window": 7}))
    plain = trial_config(config("train.epochs=2"), Folder(str(tmp_path)), trial)
    assert plain.model.gathering.window == 7
    assert (plain.run.name, plain.run.storage, plain.train.epochs) == ("trial-0012", f"{tmp_path}/runs", 2)
    assert trial_uid("a" * 32, 12) == trial_uid("a" * 32, 12) != trial_uid("a" * 32, 13)


def test_workers_leave_room_for_the_trials_that_wait():
    asked = replace(config(), cluster=ClusterConfig(workers=2, cpus_per_worker=1.0, device="cpu"))
    resources = worker_resources(asked)
    assert (resources.workers, resources.gpus) == (2, 0)
    assert resources.cpus == SHARE < 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sweep.objectives=[accuracy,speedup]"], "FLOPs"),
        (["eval.every_epochs=0"], "evaluation per rung"),
        (["eval.every_epochs=5", "train.epochs=2"], "evaluation per rung"),
    ],
)
def test_what_a_training_sweep_cannot_do_is_refused(words, part):
    with pytest.raises(ConfigError, match=part):
        check_train(config(*words))


def test_a_trial_whose_node_is_taken_away_goes_on_and_is_not_pruned():
    outcomes = {1: "preempted: the node of rank 0 is there only a little longer", 2: "preempted: again", 3: ""}
    assert _to_its_end(lambda part: {"stopped": outcomes[part], "step": part}) == {"stopped": "", "step": 3}
    assert _to_its_end(lambda part: {"stopped": BEATEN, "step": part})["step"] == 1


def test_a_limit_on_what_no_training_trial_measures_is_refused_before_any_runs():
    with pytest.raises(ConfigError, match=r"no trial measures 'speedup'"):
        open_space(config("sweep.limits=['speedup >= 1.2']"))


@pytest.mark.parametrize("field", ["train.epochs", "train.max_steps", "eval.k"])
def test_trials_may_not_change_their_rungs(field):
    space = {field: {"choices": [1, 2]}}
    asked = config("model.img_size=64", "data.image_size=64")
    with pytest.raises(ConfigError, match="there is no such setting"):
        open_space(replace(asked, sweep=replace(asked.sweep, space=space)))


def test_the_best_settings_are_trained_first():
    values = {0: (0.8, 1.0), 1: (0.7, 1.0), 2: (0.7, 1.5)}
    points = [
        Point(n, "", {}, {"accuracy": a, "gflops": g}, {}, {}) for n, (a, g) in values.items()
    ]  # fmt: skip
    results = Results(SWEEP, None, {"accuracy": 0.0, "gflops": 2.0}, points, {}, 0.0)
    trials = {n: Trial(n, setting) for n, setting in enumerate(SPACE.grid())}
    assert best_settings(results, trials) == [trials[0].setting, trials[1].setting, trials[2].setting]
    assert gains([points[0].values], SWEEP.goals()).tolist() == [[0.8, -1.0]]
