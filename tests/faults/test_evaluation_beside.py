"""Evaluations beside the training, without Ray: the numbers are those of inside, and none is lost in silence."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ray._common.utils import resources_from_ray_options

from orchestrator.checkpoint.config import CheckpointConfig
from orchestrator.data.folder import Folder
from orchestrator.launch import evaluations
from orchestrator.launch.cluster import Resources, fits_beside
from orchestrator.launch.desk import TRIES, Desk, GoneError
from orchestrator.launch.evaluations import RayRunner
from orchestrator.train.apart import Measured, measure
from orchestrator.train.context import Silent
from orchestrator.train.loop import train
from orchestrator.train.results import DONE, FAILED, LOST, SKIPPED, Request, Result, keep, kept
from tests.support import LocalRun, losses, tiny_classifier, tiny_config, write_shards

WORDS = (
    "train.epochs=3", "eval.every_epochs=1", "eval.bank=40", "eval.baselines=true", "checkpoint.keep=1",
    "eval.figure_images=0",
)  # fmt: skip
BESIDE = (*WORDS, "eval.where=beside")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


class Measuring(LocalRun):
    """Measures what is asked for, in this process, once `late` steps have passed."""

    def __init__(self, config, late=0, attempt=1):
        super().__init__(config, attempt=attempt)
        self._config, self._late, self._waiting = config, late, []

    def ask_evaluation(self, request):
        super().ask_evaluation(request)
        self._waiting.append(request)

    def evaluated(self):
        ready = [request for request in self._waiting if self.step >= request.step + self._late]
        self._waiting = [request for request in self._waiting if request not in ready]
        results = [self.measure(request) for request in ready]
        for result in results:
            keep(self.folder, result)
        return results

    def measure(self, request):
        run = Silent(self.directory)
        run.folder, run.attempt = self.folder, self.attempt
        state = torch.get_rng_state()
        found = measure(self._config, run, request).result
        torch.set_rng_state(state)
        return found


class Raising(Measuring):
    def measure(self, request):
        return Result(request.step, FAILED, error="Traceback\nValueError: no such thing")


def journal(run, kind="metrics"):
    found = []
    for path in sorted((run.directory / "track" / "journal").rglob("*.jsonl")):
        found += [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == kind]
    return found


def scores(run):
    """Everything that evaluations gave, by step; what is recorded twice must be equal."""
    found = {}
    for record in journal(run):
        for name, value in record["values"].items():
            if name.startswith("eval/"):
                assert found.setdefault(record["step"], {}).setdefault(name, value) == value
    return found


def finish(config, run):
    outcome = train(config, run)
    return outcome, scores(run)


@pytest.mark.parametrize(("late", "pictures"), [(0, 2), (4, 0)])
def test_the_same_numbers_at_the_same_steps_and_no_loss_differs(data, tmp_path, late, pictures):
    words = ("train.optimizer.average_decay=0.9", f"eval.figure_images={pictures}")
    config = tiny_config(data, tmp_path / "inside", *WORDS, *words)
    inside = LocalRun(config)
    outcome, expected = finish(config, inside)
    apart = replace(config, eval=replace(config.eval, where="beside"), run=replace(config.run, name="apart"))
    run = Measuring(apart, late)
    beside, found = finish(apart, run)
    assert found == expected
    assert sorted(found) == [0, 4, 8, 12]
    assert [request.step for request in run.asked] == [0, 4, 8]  # the last one is made by all ranks, at the end
    assert losses(run) == losses(inside)
    assert beside.scores == outcome.scores
    assert beside.beside.startswith("3 of 3 done in ")
    assert outcome.beside == ""
    names = {artifact["path"] for artifact in journal(run, "artifact") if artifact["folder"] == "figures"}
    assert ({f"figures/features-{step:08d}.png" for step in found} <= names) == bool(pictures)


def test_every_stage_of_the_pyramid_is_measured(data, tmp_path):
    config = tiny_config(data, tmp_path, *WORDS)
    _, found = finish(config, LocalRun(config))
    for step, values in found.items():
        for stage in ("", "p16/", "p8/", "p4/"):
            for name in ("knn_top1", "linear_top1", "rankme"):
                assert f"eval/{stage}{name}" in values, step
    plain = tiny_config(data, tmp_path, *WORDS, "eval.stages=false", "run.name=plain")
    _, less = finish(plain, LocalRun(plain))
    for step, values in less.items():
        assert not any("/p" in name or "linear" in name for name in values)
        assert values == {name: found[step][name] for name in values}


def test_a_classifier_is_measured_too(data, tmp_path):
    words = ("train.epochs=2", "eval.every_epochs=1")
    config = tiny_classifier(data, tmp_path, *words)
    _, expected = finish(config, LocalRun(config))
    apart = tiny_classifier(data, tmp_path, *words, "eval.where=beside", "run.name=apart")
    _, found = finish(apart, Measuring(apart))
    assert found == expected


def test_the_best_checkpoint_stays_although_its_metric_comes_late(data, tmp_path):
    config = tiny_config(data, tmp_path, *BESIDE, "checkpoint.best_metric=eval/rankme", "checkpoint.best_mode=min")
    run = Measuring(config, late=3)
    _, found = finish(config, run)
    best = min(found, key=lambda step: found[step]["eval/rankme"])
    held = sorted(int(path.parent.name[5:]) for path in run.directory.glob("checkpoints/*/COMMITTED.json"))
    assert held == sorted({best, 12})
    assert (run.directory / "best" / "backbone.safetensors").exists()


def test_one_that_raises_is_an_event_and_the_run_goes_on(data, tmp_path):
    config = tiny_config(data, tmp_path, *BESIDE)
    run = Raising(config)
    outcome, found = finish(config, run)
    assert sorted(found) == [12]
    for step in (0, 4, 8):
        assert f"warning: the evaluation of step {step} is failed: ValueError: no such thing" in run.notes
    tags = {name: value for record in journal(run, "tags") for name, value in record["values"].items()}
    assert tags["evaluation-00000004"] == "failed: ValueError: no such thing"
    assert "failed: step 0, 4, 8" in outcome.beside


def test_what_never_comes_back_is_lost_and_said_to_be(data, tmp_path):
    config = tiny_config(data, tmp_path, *BESIDE, "eval.wait_s=0.1")
    run = LocalRun(config)
    outcome, _ = finish(config, run)
    assert [request.step for request in run.asked] == [0, 4, 8]
    assert {result.step: result.state for result in kept(run.folder)} == dict.fromkeys((0, 4, 8), LOST)
    assert sum("eval.wait_s" in note for note in run.notes) == 3
    assert "lost: step 0, 4, 8" in outcome.beside


def test_a_restart_asks_again_for_what_has_no_result(data, tmp_path):
    config = tiny_config(data, tmp_path, *BESIDE, "train.log_every=1")
    first = LocalRun(config)  # nobody measures
    first.stop_after = 6
    stopped = train(config, first).step
    assert 4 < stopped < 8
    held = {int(path.parent.name[5:]) for path in first.directory.glob("checkpoints/*/COMMITTED.json")}
    assert held == {0, 4, stopped}  # checkpoint.keep=1, but nobody has measured them yet
    again = Measuring(config, attempt=2)
    _, found = finish(config, again)
    assert [request.step for request in again.asked] == [0, 4, 8]
    assert sorted(found) == [0, 4, 8, 12]
    assert sorted(losses(again)) == list(range(1, 13))


def test_results_that_came_after_the_checkpoint_are_taken_from_storage(data, tmp_path):
    config = tiny_config(data, tmp_path, *BESIDE, "train.log_every=1")
    first = LocalRun(config)
    first.stop_after = 6
    train(config, first)
    for request in first.asked:
        keep(first.folder, Measuring(config).measure(request))
    again = Measuring(config, attempt=2)
    outcome, found = finish(config, again)
    assert [request.step for request in again.asked] == [8]
    assert sorted(found) == [0, 4, 8, 12]
    assert "k-NN untrained" in outcome.scores


def test_going_on_inside_names_what_is_lost(data, tmp_path):
    beside = tiny_config(data, tmp_path, *BESIDE, "train.log_every=1")
    first = LocalRun(beside)
    first.stop_after = 6
    train(beside, first)
    config = tiny_config(data, tmp_path, *WORDS, "train.log_every=1", "eval.where=inside")
    run = LocalRun(config, attempt=2)
    finish(config, run)
    assert sum("eval.where=inside" in note for note in run.notes) == 2
    assert {result.step: result.state for result in kept(run.folder)} == {0: LOST, 4: LOST}


# -- the driver's desk, with real processes -------------------------------------------------------------------------


ANSWER = "pass"
HANG = "import time; time.sleep(600)"
DIE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
FAIL = "raise ValueError('it cannot be measured')"


class Processes:
    """A runner whose tasks are processes of this machine; they run these scripts in turn, the last one for ever."""

    def __init__(self, *scripts):
        self.scripts, self.wanted, self.free = list(scripts), False, True
        self.started = []

    def room(self):
        return self.free and not self.wanted

    def claimed(self):
        return self.wanted

    def start(self, request, colours):
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.started.append(request)
        return request, subprocess.Popen([sys.executable, "-S", "-c", script], stderr=subprocess.PIPE, text=True)

    def poll(self, task):
        request, process = task
        if process.poll() is None:
            return None
        _, error = process.communicate()
        if process.returncode < 0:
            raise GoneError(f"exit code {process.returncode}")
        if process.returncode:
            raise RuntimeError(error)
        return Measured(Result(request.step, DONE, {"eval/knn_top1": request.step / 100}))

    def stop(self, task):
        task[1].kill()
        task[1].communicate()


class Office:
    """A desk over processes, what it told, and its clock."""

    def __init__(self, tmp_path, *scripts):
        self.runner, self.told, self.now = Processes(*scripts), [], 0.0
        self.folder = Folder(str(tmp_path))
        best = CheckpointConfig(best_metric="eval/knn_top1")
        self.desk = Desk(self.runner, self.folder, 60.0, best, self.told.append, clock=lambda: self.now)

    def until(self, count, seconds=60):
        deadline = time.monotonic() + seconds
        while len(self.told) < count:
            self.desk.look()
            assert time.monotonic() < deadline, self.told
            time.sleep(0.02)
        assert kept(self.folder) == sorted(self.told, key=lambda result: result.step)
        return {result.step: result for result in self.told}


def test_one_after_the_other_and_each_knows_the_best_so_far(tmp_path):
    office = Office(tmp_path, ANSWER)
    for step in (10, 20):
        office.desk.ask(Request(step, 0.05))
    office.desk.ask(Request(10))  # a new worker group asks again
    found = office.until(2)
    assert {step: result.state for step, result in found.items()} == {10: DONE, 20: DONE}
    assert [(request.step, request.best) for request in office.runner.started] == [(10, 0.05), (20, 0.1)]


def test_one_that_dies_is_started_again_and_lost_in_the_end(tmp_path):
    office = Office(tmp_path, DIE, ANSWER)
    office.desk.ask(Request(10))
    assert office.until(1)[10].state == DONE
    assert len(office.runner.started) == 2
    office.runner.scripts = [DIE]
    office.desk.ask(Request(20))
    lost = office.until(2)[20]
    assert lost.state == LOST
    assert lost.error == f"exit code -9 ({TRIES} tries)"


def test_one_that_raises_or_hangs_fails_and_the_next_has_its_turn(tmp_path):
    office = Office(tmp_path, FAIL, HANG, ANSWER)
    for step in (10, 20):
        office.desk.ask(Request(step))
    office.until(1)
    office.desk.ask(Request(30))
    office.desk.look()
    office.now = 61.0
    found = office.until(3)
    assert found[10].error.strip().endswith("ValueError: it cannot be measured")
    assert found[20].error == "it took longer than train.guard.evaluate_s=60"
    assert [found[step].state for step in (10, 20, 30)] == [FAILED, FAILED, DONE]
    assert [found[step].seconds for step in (10, 20)] == [0.0, 61.0]


def test_it_gives_way_to_the_training_and_waits_its_turn(tmp_path):
    office = Office(tmp_path, HANG, ANSWER)
    office.desk.ask(Request(10))
    office.desk.look()
    office.runner.wanted = True
    for _ in range(3):
        office.desk.look()
    assert office.desk.yielded == 1
    assert len(office.runner.started) == 1
    assert not office.told
    office.runner.wanted, office.runner.free = False, False
    office.desk.look()
    assert len(office.runner.started) == 1  # no room
    office.runner.free = True
    assert office.until(1)[10].state == DONE


def test_a_slow_evaluation_leaves_out_the_oldest_that_waits_but_never_the_first(tmp_path):
    office = Office(tmp_path, HANG, ANSWER)
    office.runner.free = False
    for step in (0, 10, 20, 30):
        office.desk.ask(Request(step))
    office.desk.look()
    assert {result.step: result.state for result in office.told} == {10: SKIPPED}
    assert "longer than their interval: step 30 asked" in office.told[0].error
    office.runner.free = True
    office.desk.look()
    office.desk.ask(Request(40))
    office.desk.look()
    assert {result.step: result.state for result in office.told} == {10: SKIPPED, 20: SKIPPED}
    assert office.desk.close() == [0, 30, 40]


def test_results_wait_for_storage_that_is_away(tmp_path):
    office = Office(tmp_path, ANSWER)
    place = tmp_path / "evaluations"
    place.write_text("a file where the folder belongs")
    office.desk.ask(Request(10))
    deadline = time.monotonic() + 60
    while not office.told:
        office.desk.look()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    place.unlink()
    office.desk.look()
    assert [result.step for result in kept(office.folder)] == [10]


def test_a_request_does_not_wait_for_storage(tmp_path, monkeypatch):
    """Rank 0's requests and the run's states come by the same thread."""
    office, writing, written = Office(tmp_path, ANSWER), threading.Event(), threading.Event()

    def slow(folder, result):
        writing.set()
        assert written.wait(60)
        keep(folder, result)

    monkeypatch.setattr("orchestrator.launch.desk.keep", slow)
    office.desk.ask(Request(10))
    looking = threading.Thread(target=office.until, args=(1,), daemon=True)
    looking.start()
    assert writing.wait(60)
    asking = threading.Thread(target=office.desk.ask, args=(Request(20),), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()
    assert not office.told, "it is kept before it is told"
    written.set()
    looking.join(60)
    assert [result.step for result in office.told] == [10]


def test_one_that_could_not_be_started_has_its_turn_again(tmp_path, monkeypatch):
    office = Office(tmp_path, ANSWER)
    start, trouble = office.runner.start, [ConnectionError("the cluster does not answer")]
    monkeypatch.setattr(
        office.runner, "start", lambda *args: start(*args) if not trouble else (_ for _ in ()).throw(trouble.pop())
    )
    office.desk.ask(Request(10))
    with pytest.raises(ConnectionError):
        office.desk.look()
    assert office.until(1)[10].state == DONE


@pytest.mark.parametrize(
    "asked", [Resources(2, 3.0, 1, accelerator="H100"), Resources(2, 3.0, 1), Resources(2, 3.0, 0)]
)
def test_an_evaluation_asks_ray_for_what_a_worker_asks(monkeypatch, asked):
    given = {}

    def remote(**options):
        given.update(resources_from_ray_options(options))
        return lambda function: SimpleNamespace(remote=lambda *_: function)

    monkeypatch.setattr(evaluations.ray, "remote", remote)
    RayRunner(None, asked).start(Request(10), None)
    assert {name: amount for name, amount in given.items() if amount} == asked.bundle


@pytest.mark.parametrize(
    ("nodes", "workers", "fits"),
    [
        ([{"CPU": 2.0}], 1, True),
        ([{"CPU": 2.0}], 2, False),
        ([{"CPU": 2.0}, {"CPU": 1.0}], 2, True),
        ([{"CPU": 1.5}, {"CPU": 1.5}], 2, False),
        ([{"CPU": 8.0}, {}], 8, False),
    ],
)
def test_room_beside_the_workers(nodes, workers, fits):
    assert fits_beside(nodes, Resources(workers, 1.0, 0)) == fits


def test_an_evaluation_needs_a_device_like_a_worker():
    nodes = [{"CPU": 16.0, "GPU": 2.0}]
    assert fits_beside(nodes, Resources(1, 1.0, 1))
    assert not fits_beside(nodes, Resources(2, 1.0, 1))
