"""Storage that fails during a save, a full disk, and stop requests at bad moments."""

import contextlib
import os
import subprocess
import time

import pytest

from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.errors import StorageGoneError
from orchestrator.data.folder import Folder, StorageError
from orchestrator.track.journal import JournalError
from orchestrator.train.loop import train
from orchestrator.train.records import RunRecords
from tests.support import LocalRun, losses, tiny_config, write_shards

EACH_STEP = ("checkpoint.every_steps=1", "train.log_every=1", "checkpoint.retry_s=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    config = tiny_config(data, tmp_path_factory.mktemp("whole"))
    train(config, LocalRun(config))
    return losses(LocalRun(config))


class UnreachableFor(Folder):
    """A folder whose next `failing` writes of checkpoints are refused."""

    failing = 0

    def put(self, key, data, **options):
        if key.startswith("checkpoints/") and self.failing:
            self.failing -= 1
            raise StorageError(f"cannot write {self.uri}/{key}: no route to host")
        return super().put(key, data, **options)


def run_with_outage(config, failing):
    run = LocalRun(config)
    run.folder = UnreachableFor(run.folder.uri)
    run.folder.failing = failing
    return run


def test_training_goes_on_while_storage_is_unreachable(data, uninterrupted, tmp_path):
    config = tiny_config(data, tmp_path, *EACH_STEP)
    run = run_with_outage(config, failing=2)
    outcome = train(config, run)
    assert outcome.step == 8
    assert losses(run) == uninterrupted
    assert any("a checkpoint was not saved" in note and "no route to host" in note for note in run.notes)
    assert CheckpointStore(run.folder, keep=3).load_newest().step == 8


def test_a_run_without_commits_for_too_long_ends_as_failed(data, tmp_path):
    config = tiny_config(data, tmp_path, *EACH_STEP)
    first = LocalRun(config)
    first.stop_after = 2
    saved = train(config, first).step
    assert saved < 8
    config = tiny_config(data, tmp_path, *EACH_STEP, "checkpoint.max_age_s=0")
    run = run_with_outage(config, failing=10**6)
    with pytest.raises(StorageGoneError, match=r"checkpoint.max_age_s=0 .*no route to host"):
        train(config, run)
    # What was committed before is untouched.
    assert CheckpointStore(run.folder, keep=3).load_newest().step == saved


def test_the_end_of_a_run_waits_for_storage_to_come_back(data, tmp_path):
    config = tiny_config(data, tmp_path, "checkpoint.retry_s=0.01")
    run = run_with_outage(config, failing=3)
    assert train(config, run).step == 8
    assert CheckpointStore(run.folder, keep=3).load_newest().step == 8


def test_a_stop_request_gives_up_at_its_deadline(data, tmp_path):
    config = tiny_config(data, tmp_path, "checkpoint.retry_s=0.01", "checkpoint.stop_deadline_s=0.2")
    run = run_with_outage(config, failing=10**6)
    run.stop_after = 3
    with pytest.raises(StorageGoneError, match=r"checkpoint.stop_deadline_s=0.2"):
        train(config, run)


def test_a_slow_save_never_holds_up_the_step(data, uninterrupted, tmp_path, monkeypatch):
    """Saves that come due while one is being written wait for their turn, not the training for them."""
    config = tiny_config(data, tmp_path, *EACH_STEP)
    run = LocalRun(config)
    real, blocked = CheckpointStore._write, []

    def slow(self, snapshot, before_commit):
        time.sleep(0.3)
        return real(self, snapshot, before_commit)

    monkeypatch.setattr(CheckpointStore, "_write", slow)
    real_save = CheckpointStore.save

    def save(self, *args):
        blocked.append(self.busy)
        real_save(self, *args)

    monkeypatch.setattr(CheckpointStore, "save", save)
    train(config, run)
    assert losses(run) == uninterrupted
    assert True not in blocked
    assert CheckpointStore(run.folder, keep=3).load_newest().step == 8


def test_stop_during_a_save_ends_with_a_whole_checkpoint(data, uninterrupted, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path, *EACH_STEP)
    first = LocalRun(config)
    real = CheckpointStore._write

    def slow(self, snapshot, before_commit):
        first.stop_after = first.stop_after or 1  # asked for while the first save is being written
        time.sleep(0.2)
        return real(self, snapshot, before_commit)

    monkeypatch.setattr(CheckpointStore, "_write", slow)
    outcome = train(config, first)
    assert outcome.stopped == "test"
    assert CheckpointStore(first.folder, keep=3).load_newest().step == outcome.step < 8
    second = LocalRun(config, attempt=2)
    assert train(config, second).step == 8
    assert losses(second) == uninterrupted


@pytest.fixture
def small_disk(tmp_path):
    """A file system that is really full soon."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path):
    """Writes until the file system is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def test_disk_full_during_a_save(data, small_disk, tmp_path):
    config = tiny_config(data, small_disk, *EACH_STEP, "checkpoint.keep=1", "checkpoint.max_age_s=60")
    filler = small_disk / "filler"
    run = LocalRun(config)
    run.directory = tmp_path / "local"
    run.directory.mkdir()
    real, seen = run.progress, []

    def progress(stage, *, step=0, **rest):
        real(stage, step=step, **rest)
        if step == 2:
            fill(filler)
        if step == 6 and filler.exists():
            seen.extend(run.notes)
            filler.unlink()

    run.progress = progress
    assert train(config, run).step == 8
    assert any("a checkpoint was not saved" in note for note in seen)
    assert CheckpointStore(run.folder, keep=1).load_newest().step == 8
    # Nothing of the failed saves is left to fill the disk.
    assert os.listdir(small_disk / "tiny" / "checkpoints") == ["step-00000008"]


def test_a_full_disk_under_the_journal_is_an_error_told_at_the_first_loss(data, small_disk, tmp_path):
    """The checkpoint is saved, the run ends as failed, and with room again it goes on from there."""
    config = tiny_config(data, tmp_path, "train.log_every=1", "train.epochs=8")  # a last half page takes some steps
    run, filler = LocalRun(config), small_disk / "filler"
    run.directory = small_disk / "local"
    run.directory.mkdir()
    real = run.progress

    def progress(stage, *, step=0, **rest):
        real(stage, step=step, **rest)
        if step == 3:
            fill(filler)

    run.progress = progress
    with pytest.raises(
        JournalError, match=r"journal of this run cannot be written: .*No space left.* records are lost"
    ):
        train(config, run)
    assert len([note for note in run.notes if note.startswith("error: the journal of this run cannot be")]) == 1
    assert run.windows[-1][2]["tracking/lost_records"] > 0
    saved = CheckpointStore(run.folder, keep=3).load_newest().step
    assert 3 < saved == run.windows[-1][0] < 32, "saved where it was noticed"
    filler.unlink()
    again = LocalRun(config, attempt=2)
    again.directory = run.directory
    assert train(config, again).step == 32
    assert set(range(saved + 1, 33)) <= losses(again).keys()


def test_a_record_lost_at_the_very_end_is_an_error_too(data, small_disk, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    run = LocalRun(config)
    run.directory = small_disk / "local"
    run.directory.mkdir()
    real = RunRecords.final

    def final(self, *given):
        real(self, *given)
        fill(small_disk / "filler")
        for _ in range(20):  # more than the last half page takes
            self.state("running", "x" * 1000)

    monkeypatch.setattr(RunRecords, "final", final)
    with pytest.raises(JournalError, match="type the same command again"):
        train(config, run)
    assert CheckpointStore(run.folder, keep=3).load_newest().step == 8
