"""What a launch decides and shows without a cluster: run identity, folders, the progress line."""

import io

import pytest

from orchestrator.config.errors import SettingError
from orchestrator.config.identity import fingerprint, result_fields
from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder, StorageError
from orchestrator.launch.board import News, Progress
from orchestrator.launch.home import resolve
from orchestrator.launch.record import RunRecord, open_record
from orchestrator.launch.show import ProgressLine, describe, duration, table


def config(*words):
    return load(PretrainConfig, None, words)


def name_of(*words):
    return fingerprint(result_fields(config(*words), "manifest"))


def test_only_settings_that_affect_the_result_change_the_name():
    same = ("cluster.workers=7", "run.storage=/x", "track.experiment=y", "checkpoint.keep=9", "data.source=/other")
    for words in same:
        assert name_of(words) == name_of(), words
    for words in ("train.seed=1", "model.embed_dim=256", "objective.mask_ratio=0.5", "data.crop_scale=[0.5,1.0]"):
        assert name_of(words) != name_of(), words
    assert fingerprint(result_fields(config(), "other data")) != name_of()


def test_record_comes_back_and_refuses_other_settings(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    fields = result_fields(config(), "m")
    record = open_record(folder, fields, "n").next_attempt()
    record.save(folder)
    again = open_record(folder, fields, "n")
    assert again == RunRecord(record.run_uid, fields, attempts=1)
    with pytest.raises(SettingError, match=r"train\.seed: was 0, now 3"):
        open_record(folder, result_fields(config("train.seed=3"), "m"), "n")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"run_uid": "a", "fields": 3}', b'{"run_uid": "a", "more": 1}']
)
def test_a_damaged_record_is_said_and_left_alone(tmp_path, body):
    folder = Folder(str(tmp_path))
    folder.put("run.json", body)
    with pytest.raises(SettingError, match=r"run.json is damaged \(.+\): nobody can say .* give another run.name"):
        open_record(folder, {}, "n")
    assert folder.get("run.json") == body


def test_places_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve(config("data.source=shards"), {"ITPN_HOME": "/h"})
    assert found.data.source == str(tmp_path / "shards")
    assert found.run.storage == "/h/runs"
    assert found.track.uri == "sqlite:////h/runs/mlflow.db"
    assert resolve(config(), {"ITPN_HOME": "/h"}).data.source == "/h/data/fashion-mnist"
    remote = resolve(config("run.storage=s3://b/runs"), {"ITPN_HOME": "/h", "MLFLOW_TRACKING_URI": "http://m:5000"})
    assert (remote.run.storage, remote.track.uri) == ("s3://b/runs", "http://m:5000")


def test_folder_writes_whole_objects_and_creates_once(tmp_path):
    folder = Folder(str(tmp_path / "f"))
    assert folder.put("a/b", b"1", only_if_absent=True)
    assert not folder.put("a/b", b"2", only_if_absent=True)
    assert folder.get("a/b") == b"1"
    assert folder.put("a/b", b"3")
    assert (folder.get("a/b"), folder.names("a"), folder.names()) == (b"3", ["b"], ["a"])
    folder.delete(["a/b", "a/none"])
    assert not folder.exists("a/b")
    with pytest.raises(FileNotFoundError):
        folder.get("a/b")
    with pytest.raises(StorageError, match="Use a path"):
        Folder("what://x")


PROGRESS = Progress("training", step=120, total=480, epoch=1, loss=-0.5, images_per_second=310.2, seconds_per_step=1.0)


def test_progress_says_what_a_person_asks():
    assert describe(PROGRESS) == "training  step 120/480  epoch 2  loss -0.5000  310 images/s  6 min left"
    assert describe(Progress("evaluating")) == "evaluating"
    assert [duration(s) for s in (4, 600, 7200)] == ["4 s", "10 min", "2.0 h"]


def test_progress_is_quiet_when_not_a_terminal():
    out = io.StringIO()
    line = ProgressLine(out)
    for _ in range(5):
        line(News(PROGRESS))
    line(News(PROGRESS, ["resumed"]))
    line.close()
    assert out.getvalue().splitlines() == [describe(PROGRESS), "resumed"]


def test_progress_rewrites_one_line_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    line = ProgressLine(out)
    line(News(PROGRESS))
    line(News(PROGRESS, ["a note"]))
    line.close()
    assert out.getvalue().count("\n") == 2
    assert "\ra note" in out.getvalue().replace(" ", "").replace("anote", "a note")


def test_table_aligns():
    lines = table([("run", "x"), ("images/s", "310")]).splitlines()
    assert lines[1].index("x") == lines[2].index("3")
    assert set(lines[0]) == {"-"}
