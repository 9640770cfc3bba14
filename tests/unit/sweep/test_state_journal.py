"""The state of a sweep: trials that fail, hang drivers that die, and what a restart finds."""

import functools
import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from itpn_core.errors import ConfigError, UserError
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.folder import Folder, StorageError
from orchestrator.sweep.front import Objective
from orchestrator.sweep.journal import End, TrialJournal
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.sampler import make_sampler
from orchestrator.sweep.state import OutOfMemory, SweepState, measured, run_trial

GOALS = (Objective("accuracy"), Objective("speedup"))
TRIALS = 36
SPACE = {
    "drops": {"choices": [0, 1]},
    "model.migration.keep[0]": {"low": 0.5, "high": 0.9, "step": 0.01, "when": {"drops": 1}},
    "model.gathering.window": {"choices": [0, 2, 4, 7, 14]},
}


def space():
    return parse_space(SPACE)


def open_state(root, trials=TRIALS, retries=1):
    make = functools.partial(make_sampler, "tpe", space(), GOALS, seed=3, startup=6)
    return SweepState(
        TrialJournal(Folder(str(root))), space(), lambda known: make(trials=known), trials=trials, retries=retries
    )


def values(trial):
    keep = trial.setting.get("model.migration.keep[0]", 1.0)
    window = trial.setting["model.gathering.window"]
    return {"accuracy": 0.9 - 0.2 * (1 - keep) ** 2 - 0.001 * window, "speedup": 1 + (1 - keep) + 0.02 * window}


def measure(log, pause, trial):
    """A trial that notes that it ran; some raise, some exhaust memory."""
    time.sleep(pause)
    with Path(log).open("a") as file:
        file.write(f"{trial.number}\n")
    if trial.number % 9 == 4:
        raise ValueError("a trial that raises")
    if trial.number % 9 == 7:
        raise OutOfMemory("a trial that needs too much")
    return measured(FINISHED, values(trial), {"seen": trial.number}, time.time())


def drive(root, log, pause=0.0):
    state = open_state(root)
    while (trial := state.next()) is not None:
        run_trial(state.journal, trial, functools.partial(measure, log, pause), state.retries)
        state.close(trial.number)


def wait_for(root, more, besides, child):
    """Until the driver has ended some more trials (a start takes longer than a trial)."""
    deadline = time.monotonic() + 60
    while len(ends(root)) < min(besides + more, TRIALS) and child.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ends(root):
    return {path.parent.name: path.read_bytes() for path in Path(root, "trials").glob("*/end.json")}


def outcome(root):
    """What was asked and what came of it, without times."""
    found = []
    for path in sorted(Path(root, "trials").glob("*/end.json")):
        end, asked = json.loads(path.read_text()), json.loads((path.parent / "asked.json").read_text())
        found.append((asked["number"], asked["values"], end["state"], end["values"]))
    return found


def test_ten_sigkills_lose_nothing_double_nothing_and_change_no_decision(tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    drive(whole, tmp_path / "other-log")
    # Children of a server that has imported everything and started no thread: a fork of this process could hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(0)
    kept, ran = {}, 0
    for kill in range(11):
        child = context.Process(target=drive, args=(killed, log, 0.03))
        child.start()
        wait_for(root=killed, more=rng.randrange(3), besides=len(kept), child=child)
        child.join(rng.uniform(0.0, 0.04) if kill < 10 else 120)
        if kill < 10:
            assert child.is_alive(), f"the sweep was over before kill {kill}: {len(ends(killed))} trials"
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        lines = log.read_text().split()[ran:] if log.exists() else []
        assert not {f"{int(number):06d}" for number in lines} & kept.keys(), "a finished trial ran again"
        found = ends(killed)
        assert {name: found.get(name) for name in kept} == kept
        kept, ran = found, ran + len(lines)
    assert len(kept) == TRIALS
    assert outcome(killed) == outcome(whole)
    settings = [json.dumps(asked, sort_keys=True) for _, asked, _, _ in outcome(killed)]
    assert len(set(settings)) == TRIALS
    states = [state for _, _, state, _ in outcome(killed)]
    assert {states.count(s) > 0 for s in (FINISHED, FAILED, INFEASIBLE)} == {True}


def test_a_failing_trial_is_retried_then_recorded_and_excluded(tmp_path):
    state, attempts = open_state(tmp_path, retries=2), []
    trial = state.next()

    def fail(_):
        attempts.append(1)
        raise RuntimeError("broken")

    run_trial(state.journal, trial, fail, retries=2)
    end = state.close(trial.number)
    assert len(attempts) == 3
    assert (end.state, end.error, dict(end.values)) == (FAILED, "RuntimeError: broken", {})
    assert state.journal.failures(trial.number) == 3
    assert open_state(tmp_path).next().number == 1


@pytest.mark.parametrize("error", [RuntimeError, StorageError, StorageGoneError])
def test_a_trial_that_recovers_counts(tmp_path, error):
    state, attempts = open_state(tmp_path), []
    trial = state.next()

    def flaky(found):
        attempts.append(1)
        if len(attempts) == 1:
            raise error("once")
        return measured(FINISHED, values(found), {}, time.time())

    assert run_trial(state.journal, trial, flaky, retries=1).state == FINISHED


def test_memory_and_the_user_s_mistakes_are_not_retried(tmp_path):
    state = open_state(tmp_path)
    for error, wanted in ((OutOfMemory("too big"), INFEASIBLE), (UserError("no such file"), FAILED)):
        attempts, trial = [], state.next()

        def fail(_, error=error, attempts=attempts):
            attempts.append(1)
            raise error

        run_trial(state.journal, trial, fail, retries=5)
        assert (state.close(trial.number).state, len(attempts)) == (wanted, 1)


def test_the_first_end_counts_and_a_trial_that_left_none_has_failed(tmp_path):
    state = open_state(tmp_path)
    trial = state.next()
    first, second = End(FINISHED, values(trial)), End(FAILED, error="too late")
    assert state.journal.ended(trial.number, first) == first
    assert state.journal.ended(trial.number, second) == first
    assert state.close(trial.number) == first
    silent = state.next()
    assert state.close(silent.number).error == "the trial left no result"


def test_two_drivers_of_one_sweep_are_told(tmp_path):
    one, two = open_state(tmp_path), open_state(tmp_path)
    one.next()
    with pytest.raises(UserError, match="another process runs the same sweep"):
        two.next()


def test_a_changed_space_is_refused_by_the_journal(tmp_path):
    state = open_state(tmp_path)
    state.next()
    other = parse_space({"model.gathering.window": {"choices": [3]}})
    with pytest.raises(ConfigError):
        TrialJournal(Folder(str(tmp_path))).load(other)


def test_the_budget_and_the_end_of_the_space_end_a_sweep(tmp_path):
    state = open_state(tmp_path / "budget", trials=2)
    assert [state.next().number, state.next().number, state.next()] == [0, 1, None]
    small = parse_space({"model.gathering.window": {"choices": [0, 2]}})
    whole = SweepState(
        TrialJournal(Folder(str(tmp_path / "space"))), small,
        lambda known: make_sampler("tpe", small, GOALS, trials=known), trials=9, retries=0,
    )  # fmt: skip
    seen = []
    while (trial := whole.next()) is not None:
        run_trial(whole.journal, trial, lambda t: measured(FINISHED, {"accuracy": 1, "speedup": 1}, {}, 0.0), 0)
        whole.close(trial.number)
        seen.append(trial.setting["model.gathering.window"])
    assert sorted(seen) == [0, 2]
    assert whole.left == 0
