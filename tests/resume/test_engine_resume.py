"""The engine stopped anywhere and started again walks the very same curve."""

import shutil

import pytest

from orchestrator.checkpoint.store import MARKER, TENSORS, CheckpointError, CheckpointStore
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from tests.support import LocalRun, losses, tiny_config, write_shards


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    config = tiny_config(data, tmp_path_factory.mktemp("whole"))
    run = LocalRun(config)
    outcome = train(config, run)
    assert outcome.stopped == ""
    assert outcome.step == 8
    curve = losses(run)
    assert sorted(curve) == list(range(1, 9))
    return curve


@pytest.mark.parametrize("kill_at", [1, 3, 5, 7])
def test_killed_run_resumes_to_the_same_losses(data, uninterrupted, tmp_path, monkeypatch, kill_at):
    config = tiny_config(data, tmp_path, "checkpoint.every_steps=1", "train.log_every=1")
    real = Engine.step

    def step(self, batch):
        if self.state.step == kill_at:
            raise Killed
        real(self, batch)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(Killed):
        train(config, LocalRun(config))
    monkeypatch.setattr(Engine, "step", real)
    second = LocalRun(config, attempt=2)
    outcome = train(config, second)
    assert outcome.step == 8
    assert losses(second) == uninterrupted
    assert second.notes == [f"resumed from the checkpoint of step {kill_at} of 8"]


def test_stop_request_saves_and_resumes(data, uninterrupted, tmp_path):
    config = tiny_config(data, tmp_path)
    first = LocalRun(config)
    first.stop_after = 3
    outcome = train(config, first)
    assert (outcome.stopped, outcome.step) == ("test", 4)
    second = LocalRun(config, attempt=2)
    assert train(config, second).step == 8
    assert losses(second) == uninterrupted


def test_damaged_checkpoint_is_passed_over(data, uninterrupted, tmp_path, caplog):
    config = tiny_config(data, tmp_path)
    train(config, LocalRun(config))
    store = CheckpointStore(LocalRun(config).folder, keep=3)
    assert store.steps() == [4, 8]
    newest = LocalRun(config).directory / "checkpoints" / "step-00000008"
    with next(newest.glob(f"*{TENSORS}")).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="1000 bytes"):
        store.load(8)
    second = LocalRun(config, attempt=2)
    assert train(config, second).step == 8
    assert "damaged" in caplog.text
    assert "warning: the checkpoint of step 8 is damaged and is passed over" in second.notes[0]
    assert second.notes[1] == "resumed from the checkpoint of step 4 of 8"
    assert losses(second) == uninterrupted


@pytest.mark.parametrize(
    "marker",
    [b"", b"\xff\xfe\x00", b"[]", b"null", b'{"files": []}', b'{"files": {"state.json": 7}}',
     b'{"files": {"../state.json": {"bytes": 1, "sha256": ""}}}'],
)  # fmt: skip
def test_a_damaged_marker_is_passed_over(data, tmp_path, marker):
    config = tiny_config(data, tmp_path)
    train(config, LocalRun(config))
    (LocalRun(config).directory / "checkpoints" / "step-00000008" / MARKER).write_bytes(marker)
    store = CheckpointStore(LocalRun(config).folder, keep=3)
    assert store.load_newest().step == 4
    assert "the checkpoint of step 8 is damaged and is passed over" in store.passed_over[0]
    with pytest.raises(CheckpointError):
        store.state_of(8)


@pytest.mark.parametrize("words", [("checkpoint.every_steps=4",), ("checkpoint.every_minutes=0.000001",)])
def test_triggers_hold_at_the_end_of_an_epoch_too(data, tmp_path, words):
    """Windows end with epochs of four steps only; the end of an epoch by itself calls for no checkpoint."""
    config = tiny_config(data, tmp_path, "checkpoint.every_epochs=0", "train.log_every=100", *words)
    train(config, LocalRun(config))
    assert CheckpointStore(LocalRun(config).folder, keep=9).steps() == [4, 8]


def test_checkpoint_without_its_marker_does_not_exist(data, tmp_path):
    config = tiny_config(data, tmp_path)
    train(config, LocalRun(config))
    folder = LocalRun(config).directory / "checkpoints"
    (folder / "step-00000008" / MARKER).unlink()
    store = CheckpointStore(LocalRun(config).folder, keep=3)
    assert store.steps() == [4]
    shutil.rmtree(folder)
    assert store.load_newest() is None


def test_checkpoint_of_another_model_is_refused(data, tmp_path):
    config = tiny_config(data, tmp_path)
    train(config, LocalRun(config))
    other = tiny_config(data, tmp_path, "model.embed_dim=64")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(other, LocalRun(other))


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    config = tiny_config(data, tmp_path, "checkpoint.keep=2", "checkpoint.every_steps=1", "train.log_every=1")
    train(config, LocalRun(config))
    assert CheckpointStore(LocalRun(config).folder, keep=2).steps() == [7, 8]
    assert len(list((LocalRun(config).directory / "checkpoints").iterdir())) == 2
