"""Who may commit: the run log and the lease under every order of events that a schedule can bring about."""

import os
import random
import threading
import time

import pytest

from orchestrator.checkpoint.runlog import COMMIT, OWNER, RELEASED, WRITER, FencedError, RunLog, TakenError, Writer
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.data.folder import Folder, StorageError
from orchestrator.launch.lease import HeldError, Lease, describe_process, is_gone


class Elsewhere(dict):
    """A holder of another host, whose process cannot be looked at."""

    def __init__(self, host):
        super().__init__(host=host, pid=1, birth="1", boot="another kernel", pids="others", job="")


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "run"))


def entries(folder):
    log = RunLog(folder)
    last = log.last()
    return [log.entry(number) for number in range(1, last.number + 1)] if last else []


# -- the schedule of a test: one storage request at a time, in an order drawn from a seed ------------------------------


class Turns:
    """Lets threads go one request at a time; who comes next is drawn from a seed."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._condition = threading.Condition()
        self._waiting, self._running = {}, 0

    def start(self, *bodies):
        threads = [threading.Thread(target=self._body, args=(body,)) for body in bodies]
        self._running = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _body(self, body):
        try:
            body()
        finally:
            with self._condition:
                self._running -= 1
                self._next()

    def take(self):
        """Waits for this thread's turn."""
        me = threading.get_ident()
        with self._condition:
            self._waiting[me] = False
            self._next()
            while not self._waiting[me]:
                self._condition.wait()
            del self._waiting[me]

    def _next(self):
        if self._waiting and len(self._waiting) == self._running and not any(self._waiting.values()):
            self._waiting[self._random.choice(sorted(self._waiting))] = True
            self._condition.notify_all()


class Scheduled(Folder):
    """A folder whose every request waits for its turn; some answers get lost on the way back."""

    def __init__(self, uri, turns, lossy):
        super().__init__(uri)
        self._turns, self._lossy = turns, lossy

    def put(self, key, data, **options):
        self._turns.take()
        done = super().put(key, data, **options)
        if self._lossy and key.startswith("log/0") and self._lossy.random() < 0.2:
            raise StorageError("the answer got lost")
        return done

    def get(self, key):
        self._turns.take()
        return super().get(key)

    def exists(self, key):
        self._turns.take()
        return super().exists(key)

    def names(self, prefix=""):
        self._turns.take()
        return super().names(prefix)


def group(folder, term, committed):
    """A worker group that commits until somebody stops it."""
    writer = Writer(folder, term)
    for step in range(40):
        try:
            if not writer.number:
                writer.begin()
            writer.commit(step)
            committed.append((writer.number, step))
        except StorageError:
            continue
        except FencedError:
            break
    writer.close()


def take(folder, claimed):
    """A driver that takes the run over whatever its owner does, as after a lease has run out."""
    log = RunLog(folder)
    while True:
        last = log.last()
        place = last.number + 1 if last else 1
        try:
            log.create(place, OWNER, place, {"host": "x", "pid": 1, "since": "now"})
        except (TakenError, StorageError):
            continue
        claimed.append(place)
        return place


@pytest.mark.parametrize("seed", range(30))
def test_no_commit_after_a_successor_whatever_the_order(tmp_path, seed):
    """Two drivers with two groups each; the line of entries must be one that a single owner at a time explains."""
    turns = Turns(seed)
    folder = Scheduled(str(tmp_path / "run"), turns, random.Random(seed) if seed % 2 else None)
    committed, claimed = [], []

    def driver():
        term = take(folder, claimed)
        group(folder, term, committed)
        group(folder, term, committed)

    turns.start(driver, driver, lambda: (take(folder, claimed), group(folder, claimed[0], committed)))
    owner = writer = 0
    seen = []
    for entry in entries(Folder(str(tmp_path / "run"))):
        if entry.kind == OWNER:
            owner, writer = entry.number, 0
        elif entry.kind == WRITER:
            assert entry.term == owner, "a group of a driver that no longer owns the run"
            writer = entry.number
        else:
            assert entry.kind == COMMIT
            assert (entry.term, entry.facts["fence"]) == (owner, writer), "a commit without the right to it"
            seen.append((writer, entry.facts["step"]))
    assert len(claimed) == 3
    assert sorted(committed) == sorted(set(committed))
    # Whoever was told that it committed did; a commit whose answer got lost may stand there too.
    assert set(committed) <= set(seen)
    if not seed % 2:
        assert committed == seen


@pytest.mark.parametrize("seed", range(10))
def test_of_simultaneous_drivers_exactly_one_gets_the_run(tmp_path, seed):
    turns = Turns(seed)
    folder = Scheduled(str(tmp_path / "run"), turns, None)
    Folder(folder.uri)
    won, held = [], []

    def driver(name):
        def body():
            try:
                won.append(Lease.__new__(Lease))
                won[-1].__init__(folder, 600.0, Elsewhere(name))
            except HeldError as error:
                held.append(str(error))

        return body

    turns.start(*(driver(name) for name in "abc"))
    kept = [lease for lease in won if hasattr(lease, "_thread")]
    try:
        assert len(kept) == 1
        assert len(held) == 2
        assert all("is held by a driver on host" in text and "another run.name" in text for text in held)
        assert [entry.kind for entry in entries(Folder(folder.uri))] == [OWNER]
    finally:
        for lease in kept:
            lease._end.set()


class Lossy(Folder):
    """A folder that loses the answer of the next write to the log."""

    lose = False

    def put(self, key, data, **options):
        done = super().put(key, data, **options)
        if self.lose and key.startswith("log/"):
            self.lose = False
            raise StorageError("the answer got lost")
        return done


def test_a_commit_whose_answer_got_lost_is_no_loss_of_the_run(tmp_path):
    folder = Lossy(str(tmp_path))
    writer = Writer(folder)
    writer.begin()
    folder.lose = True
    with pytest.raises(StorageError):
        writer.commit(1)
    assert writer.look() is None
    writer.commit(1)
    assert [entry.kind for entry in entries(folder)] == [WRITER, COMMIT, COMMIT]
    writer.close()


# -- the lease ---------------------------------------------------------------------------------------------------------


def test_a_run_that_was_given_back_is_free_at_once(folder):
    with Lease(folder, 600.0, Elsewhere("a")) as first:
        assert (first.number, first.taken_from) == (1, "")
        with pytest.raises(
            HeldError, match=r"run run is held by a driver on host a, pid 1, since .* UTC; its lease ends"
        ):
            Lease(folder, 600.0, Elsewhere("b"))
    with Lease(folder, 600.0, Elsewhere("b")) as second:
        assert (second.number, second.taken_from) == (3, "")
    assert [entry.kind for entry in entries(folder)] == [OWNER, RELEASED, OWNER, RELEASED]


def test_a_silent_owner_loses_the_run_and_can_do_nothing_when_it_wakes(folder):
    first = Lease(folder, 600.0, Elsewhere("asleep"))
    first._end.set()  # it renews no more
    writer = Writer(folder, first.number)
    writer.begin()
    writer.commit(1)
    impatient = Lease.__new__(Lease)
    impatient._quiet_seconds = lambda entry, owner: 700.0
    impatient.__init__(folder, 600.0, Elsewhere("awake"))
    assert "has not renewed its lease for 700 s (run.lease_s=600)" in impatient.taken_from
    with pytest.raises(FencedError, match="lease has passed on \\(to host awake"):
        writer.commit(2)
    with pytest.raises(FencedError, match="nothing more is committed from here"):
        first.renew()
    with pytest.raises(FencedError, match="lease has passed on"):
        Writer(folder, first.number).begin()
    first.release()  # changes nothing
    assert entries(folder)[-1].kind == OWNER
    writer.close()
    impatient.release()


def test_the_age_of_a_lease_is_told_by_the_storage(folder, monkeypatch):
    first = Lease(folder, 600.0, Elsewhere("a"))
    first._end.set()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a host whose clock is wrong
    assert 0 <= first._quiet_seconds(first.number, first.number) < 60
    with pytest.raises(HeldError):
        Lease(folder, 600.0, Elsewhere("b"))
    assert folder.names("log") == ["00000001.json"]


def test_the_last_renewal_counts_and_not_the_beginning(folder):
    with Lease(folder, 600.0, Elsewhere("a")) as first:
        entry = folder.local_path("log/00000001.json")
        os.utime(entry, (entry.stat().st_mtime - 1000,) * 2)
        assert first._quiet_seconds(1, 1) > 900
        first.renew()
        assert first._quiet_seconds(1, 1) < 60
        with pytest.raises(HeldError):
            Lease(folder, 600.0, Elsewhere("b"))


def test_a_lease_that_is_renewed_stays(folder):
    with Lease(folder, 0.4, Elsewhere("a")) as first:
        deadline = time.monotonic() + 30
        while not folder.exists("log/beat-00000001"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(HeldError):
            Lease(folder, 0.4, Elsewhere("b"))
        first.check()


def age(folder, key, seconds):
    entry = folder.local_path(key)
    os.utime(entry, (entry.stat().st_mtime - seconds,) * 2)


class Forgetful(Folder):
    """A folder that, while told so, denies once what it lists, or raises what nobody thought of."""

    deny, wrong = "", None

    def get(self, key):
        if self.wrong:
            raise self.wrong
        if key == self.deny:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return super().get(key)


def test_a_run_whose_log_is_gone_is_lost_and_its_driver_says_so(folder):
    lease = Lease(folder, 600.0, Elsewhere("a"))
    writer = Writer(folder, lease.number)
    folder.delete_tree("log")
    assert RunLog(folder).last(lease.number) is None
    with pytest.raises(FencedError, match=r"\(log/\) is gone, so nothing may be committed; was the folder deleted"):
        lease.check()
    with pytest.raises(FencedError, match="was the folder deleted"):
        writer.begin()
    lease.release()  # raises nothing
    assert folder.names("log") == []


def test_an_entry_that_storage_lists_and_denies_is_trouble_of_storage(tmp_path):
    folder = Forgetful(str(tmp_path / "run"))
    lease = Lease(folder, 600.0, Elsewhere("a"))
    folder.deny = "log/00000001.json"
    with pytest.raises(StorageError, match="is listed, but storage says that it is not there"):
        lease.check()
    assert lease.lost is None
    lease.release()  # raises nothing
    folder.deny = ""
    lease.check()


@pytest.mark.parametrize("wrong", [FileNotFoundError("gone for a moment"), KeyError("never thought of")])
def test_a_lease_is_renewed_again_after_any_trouble(tmp_path, wrong, caplog):
    folder = Forgetful(str(tmp_path / "run"))
    with Lease(folder, 0.2, Elsewhere("a")) as lease:
        folder.wrong = wrong
        deadline = time.monotonic() + 30
        while "the lease was not renewed" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        folder.wrong = None
        folder.delete(["log/beat-00000001"])
        while not folder.exists("log/beat-00000001"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert lease.lost is None


def test_an_owner_whose_entry_is_gone_is_judged_by_its_last_sign_of_life(folder):
    first = Lease(folder, 600.0, Elsewhere("a"))
    first._end.set()
    first.renew()
    writer = Writer(folder, first.number)
    writer.begin()
    folder.delete(["log/00000001.json"])
    age(folder, "log/00000002.json", 5000)
    with pytest.raises(HeldError, match="held by a driver on host unknown"):
        Lease(folder, 600.0, Elsewhere("b"))
    age(folder, "log/beat-00000001", 5000)
    with Lease(folder, 600.0, Elsewhere("b")) as second:
        assert "has not renewed its lease for 5" in second.taken_from
        with pytest.raises(FencedError, match="lease has passed on"):
            first.check()
        with pytest.raises(FencedError):
            writer.commit(1)
    writer.close()


def test_the_process_of_this_host_is_known_to_live_or_not():
    mine = describe_process({})
    assert not is_gone(mine)
    assert is_gone({**mine, "birth": "1"})  # its number was given to somebody else
    assert not is_gone({**mine, "birth": "1", "boot": "another"})
    assert not is_gone({**mine, "birth": "1", "pids": "pid:[1]"})
    assert (
        describe_process({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_1"}}'})["job"]
        == "raysubmit_1"
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def snapshot(step, value):
    import torch

    return Snapshot(step, {"w": torch.full((8,), float(value))}, {"value": value})


def test_a_writer_that_wakes_destroys_nothing(folder):
    """The old group is in the middle of the same step as the new one, at every moment of a save."""
    old = CheckpointStore(folder, keep=3)
    old.save(snapshot(1, 1))
    old.wait()
    new = CheckpointStore(folder, keep=3)

    def successor_commits_first():
        new.save(snapshot(2, 22))
        new.wait()

    old.save(snapshot(2, 11), before_commit=successor_commits_first)
    old.wait()
    assert old.last_committed == 1
    assert "a newer worker group" in str(old.writer.lost)
    assert new.load_newest().state == {"value": 22}
    assert len(folder.names("checkpoints/step-00000002")) == 3
    old.save(snapshot(3, 11))
    old.wait()
    assert new.steps() == [1, 2]
    assert folder.names("checkpoints") == ["step-00000001", "step-00000002"]
    old.close()
    new.close()


def test_every_marker_carries_a_growing_fencing_number(folder):
    import json

    fences = []
    for step in (1, 2, 3):
        store = CheckpointStore(folder, keep=5)
        store.save(snapshot(step, step))
        store.close()
        fences.append(json.loads(folder.get(f"checkpoints/step-{step:08d}/COMMITTED.json"))["fence"])
    assert fences == sorted(set(fences))


def test_a_group_of_a_driver_that_has_ended_may_not_begin(folder):
    with Lease(folder, 600.0, Elsewhere("a")) as lease:
        term = lease.number
    with pytest.raises(FencedError, match="has ended"):
        Writer(folder, term).begin()
