"""Delays land in the class of what they delayed. Time stands still but for the injected delays, so this is exact."""

from types import SimpleNamespace

import pytest

from itpn_core.evaluation.peaks import listed_peak
from orchestrator.data.loader import Loader
from orchestrator.data.views import EvalView
from orchestrator.train import goodput
from orchestrator.train.engine import Engine
from orchestrator.train.ledger import CLASSES, KEY, Ledger, Stopwatch, Trace
from orchestrator.train.loop import train
from orchestrator.train.pretraining import Pretraining
from orchestrator.train.records import RunRecords
from orchestrator.train.state import TrainState
from orchestrator.train.step import Step
from tests.support import LocalRun, tiny_config, write_shards

DELAY = 5.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(goodput, "Stopwatch", lambda: Stopwatch(lambda: now.seconds))
    monkeypatch.setattr(goodput, "time", SimpleNamespace(time=lambda: now.seconds))
    return now


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def last_trace(run):
    return Trace.loads(run.folder.get(KEY))


def nonzero(ledger):
    return {name: seconds for name, seconds in ledger.seconds.items() if seconds}


@pytest.mark.parametrize(
    ("owner", "method", "expected"),
    [
        (Loader, "__next__", "data"),
        (Step, "__call__", "compute"),
        (TrainState, "snapshot", "checkpoint"),
        (Pretraining, "evaluate", "evaluation"),
        (TrainState, "restore", "restart"),
        (RunRecords, "final", "checkpoint"),
    ],
)
def test_a_delay_lands_in_its_class(data, tmp_path, monkeypatch, clock, owner, method, expected):
    config = tiny_config(data, tmp_path, "eval.every_epochs=1")
    first = LocalRun(config)
    first.stop_after = 3
    train(config, first)
    real, calls = getattr(owner, method), []

    def late(self, *args, **kwargs):
        evaluating = isinstance(self, Loader) and isinstance(self._spec.view, EvalView)
        if not calls and not evaluating:
            calls.append(method)
            clock.seconds += DELAY
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, late)
    run = LocalRun(config, attempt=2)
    outcome = train(config, run)
    assert outcome.step == 8
    assert nonzero(last_trace(run).ledger) == {expected: DELAY}
    assert last_trace(run).ledger.unaccounted == 0
    assert outcome.restarts == 0
    assert "unaccounted 0.0 %" in outcome.goodput


def test_a_kill_makes_lost_work_and_a_restart(data, tmp_path, monkeypatch, clock):
    """Each step takes a second; checkpoint after step 4, killed before step 7 is done; 5 s until the next start."""
    config = tiny_config(data, tmp_path, "train.log_every=1")
    real = Step.__call__

    def step(self, *args):
        clock.seconds += 1
        if self.state.step == 6:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(Step, "__call__", step)
    with pytest.raises(Killed):
        train(config, LocalRun(config))
    assert nonzero(last_trace(LocalRun(config)).ledger) == {"compute": 6}
    clock.seconds += DELAY
    monkeypatch.setattr(Step, "__call__", real)
    run = LocalRun(config, attempt=2)
    outcome = train(config, run)
    assert (outcome.restarts, outcome.redone_steps) == (1, 2)
    # The second in which the kill came was never reported: it belongs to the pause.
    assert nonzero(last_trace(run).ledger) == {"compute": 4, "lost": 2, "restart": DELAY + 1}
    assert last_trace(run).ledger.unaccounted == 0
    assert outcome.goodput.startswith("compute 33.3 %, start and restart 50.0 %, lost work 16.7 %")


def test_what_comes_before_the_engine_is_start(data, tmp_path, clock):
    config = tiny_config(data, tmp_path)
    run = LocalRun(config)
    run.began_at = clock.seconds - DELAY
    outcome = train(config, run)
    assert nonzero(last_trace(run).ledger) == {"restart": DELAY}
    assert last_trace(run).ledger.elapsed == DELAY
    assert outcome.goodput.startswith("start and restart 100.0 %")


def test_an_unreadable_ledger_is_said_and_does_not_stop_the_run(data, tmp_path):
    config = tiny_config(data, tmp_path)
    run = LocalRun(config)
    run.folder.put(KEY, b"{")
    assert train(config, run).step == 8
    assert any("goodput ledger" in note for note in run.notes)


def test_nearly_all_real_time_is_accounted_for(data, tmp_path):
    config = tiny_config(data, tmp_path, "train.epochs=4")
    run = LocalRun(config)
    train(config, run)
    ledger = last_trace(run).ledger
    assert set(ledger.seconds) == set(CLASSES)
    # Shown, not only small: the remainder is never spread over the classes.
    assert 0 <= ledger.unaccounted < 0.01 * ledger.elapsed, ledger.describe()
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        assert isinstance(engine.state.ledger, Ledger)
        assert engine.state.ledger.elapsed > 0


def test_utilisation_needs_a_stated_peak(data, tmp_path):
    without = tiny_config(data, tmp_path / "a")
    assert train(without, LocalRun(without)).mfu == 0
    stated = tiny_config(data, tmp_path / "b", "train.peak_tflops=0.001")
    outcome = train(stated, LocalRun(stated))
    # 16-pixel images: 5 tokens, width 32; well below a hundred MFLOP each.
    assert 1e4 < outcome.mfu * 1e9 / outcome.images_per_second < 1e8


def test_device_names_find_their_peak():
    assert listed_peak("NVIDIA H100 PCIe") == 756
    assert listed_peak("NVIDIA H100 80GB HBM3") == 989.4
    assert listed_peak("NVIDIA A100-SXM4-80GB") == 312
    assert listed_peak("NVIDIA L40") == 0
    assert listed_peak("NVIDIA GeForce RTX 4090") == 165.2
