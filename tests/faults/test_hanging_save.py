"""Saves that neither succeed nor fail, and states that change while they are written."""

import json
import threading
import time

import pytest

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.errors import StorageGoneError
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from tests.support import LocalRun, tiny_config, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hanging(monkeypatch):
    """Every save hangs until the test is over."""
    over = threading.Event()
    monkeypatch.setattr(CheckpointStore, "_write", lambda *_: over.wait(120) and 0)
    yield
    over.set()


def test_a_save_that_hangs_ends_the_run_as_storage_that_is_away_does(data, tmp_path, hanging):
    words = ("train.log_every=1", "checkpoint.every_steps=1", "train.epochs=200", "checkpoint.stop_deadline_s=0.1")
    config = tiny_config(data, tmp_path, *words, "checkpoint.max_age_s=1")
    began = time.monotonic()
    with pytest.raises(
        StorageGoneError, match=r"checkpoint\.max_age_s=1 allows \(0 saves failed; the last: it is still"
    ):
        train(config, LocalRun(config))
    assert time.monotonic() - began < 60, "nor does the end wait for it"


def test_a_stop_does_not_wait_for_an_earlier_save_that_hangs(data, tmp_path, hanging):
    words = ("train.log_every=1", "checkpoint.every_steps=1", "checkpoint.stop_deadline_s=0.5")
    config = tiny_config(data, tmp_path, *words)
    run = LocalRun(config)
    run.stop_after = 2
    with pytest.raises(StorageGoneError, match=r"checkpoint\.stop_deadline_s=0\.5"):
        train(config, run)


def test_what_happens_while_a_checkpoint_is_written_is_not_in_it(data, tmp_path):
    config = tiny_config(data, tmp_path)
    with Engine(config, LocalRun(config)) as engine:
        engine.restore()
        state = engine.state
        state.skipped, state.answers = [1], {"a": [1]}
        snapshot = state.snapshot({})
        state.skipped.append(5)
        state.answers["a"].append(2)
        assert json.loads(json.dumps(snapshot.state))["skipped"] == [1]
        assert snapshot.state["answers"] == {"a": [1]}
