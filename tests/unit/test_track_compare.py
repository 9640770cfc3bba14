import math

import pytest

from jobs.compare import main
from orchestrator.track.compare import comparison, part
from orchestrator.track.config import TrackConfig
from orchestrator.track.history import load_history
from orchestrator.track.recorder import Recorder

CONFIG = TrackConfig(uri="http://127.0.0.1:9")


def write(directory, uid, lr, parts_at, attempt=1, first=0, last=50):
    recorder = Recorder(CONFIG, uid, directory, attempt, name=uid, follow=False)
    recorder.state("running")
    recorder.params({"train": {"lr": lr, "seed": 1}})
    recorder.tags({"git.commit": "abc"})
    recorder.dataset("photos/train", "d1", "/data", "training", {})
    for step in range(first, last):
        loss = 1.0 / (step + 1) * (1.5 if step >= parts_at else 1.0)
        recorder.metrics(step, {"train/loss": loss, "train/lr": lr, "system/node0/cpu": float(len(uid) * step)})
    recorder.state("finished")
    recorder.close(0)
    return directory


def test_comparison_names_the_setting_and_the_step(tmp_path, capsys):
    one = write(tmp_path / "one", "one", 0.1, parts_at=30)
    two = write(tmp_path / "two", "twotwo", 0.2, parts_at=20)
    assert main([str(one), str(two)]) == 0
    said = capsys.readouterr().out
    assert "train.lr  A 0.1  B 0.2" in said
    assert "train.seed" not in said
    assert "code, data and machine are equal" in said
    assert "train/loss: differs from step 20, visibly from step 20" in said
    assert said.index("train/lr: differs from step 0") < said.index("train/loss")  # the earliest parting first
    assert "system/" not in said


def test_equal_runs_are_called_equal(tmp_path):
    one = load_history(write(tmp_path / "one", "one", 0.1, parts_at=99))
    said = comparison(one, one)
    assert "the settings are equal" in said
    assert "train/loss: equal at all 50 common steps" in said


def test_nan_equals_nan_and_tolerance_is_relative():
    one = {0: math.nan, 1: 100.0, 2: 100.0}
    two = {0: math.nan, 1: 100.5, 2: 120.0}
    found = part("loss", one, two, 0.01)
    assert (found.first, found.visible) == (1, 2)
    assert part("loss", one, {7: 1.0}, 0.01) is None


def test_history_keeps_the_last_value_of_a_redone_step(tmp_path):
    write(tmp_path / "run", "run", 0.1, parts_at=99, last=30)
    write(tmp_path / "run", "run", 0.1, parts_at=0, attempt=2, first=20)
    history = load_history(tmp_path / "run")
    assert history.series["train/loss"][25] == pytest.approx(1.5 / 26)
    assert history.series["train/loss"][19] == pytest.approx(1.0 / 20)
    assert history.redone == 30  # ten steps, three metrics
    assert [attempt.number for attempt in history.attempts] == [1, 2]
    assert len(history.datasets) == 1


def test_a_directory_without_a_run_is_a_clear_message(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
