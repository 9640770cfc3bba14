"""Doctor: what it compares, what it finds in bad surroundings, and a whole examination."""

import copy
import multiprocessing
import re
import tempfile
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from types import SimpleNamespace

import boto3
import pytest
import timm
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from safetensors.torch import save_file
from werkzeug.serving import make_server

from itpn_core.pretraining.tasks import build_task
from orchestrator.config.load import load
from orchestrator.doctor import agreement, surroundings
from orchestrator.doctor.agreement import _short, agreed, first_difference
from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.doctor import doctor
from orchestrator.doctor.finding import Finding
from orchestrator.doctor.surroundings import examine
from orchestrator.doctor.walk import Record
from orchestrator.launch.home import resolve
from orchestrator.train.context import Silent
from orchestrator.train.engine import Engine
from tests.support import TINY, write_shards


@pytest.fixture
def record():
    torch.manual_seed(0)
    return Record(
        ids=[[1, 2], [3, 4]],
        masks=[torch.rand(2, 4) < 0.5 for _ in range(2)],
        losses=[1.0, 0.5],
        gradients={
            step: {name: torch.rand(3, dtype=torch.float64) for name in ("stem.weight", "head.weight")}
            for step in (0, 1)
        },
    )


def test_equal_records_have_no_difference(record):
    assert first_difference(record, copy.deepcopy(record)) == ""


def test_the_first_difference_is_named(record):
    other = copy.deepcopy(record)
    other.losses[1] += 1e-6
    assert first_difference(record, other).startswith("loss of step 1")
    other.masks[1] = ~other.masks[1]
    assert first_difference(record, other) == "masks of step 1"
    other.gradients[0]["head.weight"][1] *= 1 + 1e-8
    assert "the gradient of head.weight at step 0 differs first" in first_difference(record, other)
    other.gradients[0]["stem.weight"] += 1e-6
    assert "the gradient of stem.weight at step 0 differs first" in first_difference(record, other)
    other.losses[0] += 1e-6
    assert first_difference(record, other).startswith("loss of step 0")
    assert "stem.weight" in first_difference(record, other), "it says where the loss came from"
    other.ids[0] = [2, 1]
    assert first_difference(record, other).startswith("sample ids of step 0: [2, 1]")


def test_not_a_number_is_a_difference(record):
    other = copy.deepcopy(record)
    other.losses[0] = float("nan")
    assert first_difference(record, other).startswith("loss of step 0")
    other = copy.deepcopy(record)
    other.gradients[0]["stem.weight"][0] = float("nan")
    assert "stem.weight" in first_difference(record, other)


def test_gradients_that_only_one_group_has_are_a_difference(record):
    other = copy.deepcopy(record)
    del other.gradients[0]["head.weight"]
    assert first_difference(record, other) == "the gradient of head.weight is missing at step 0"
    assert first_difference(other, record) == "head.weight has a gradient at step 0 that it should not have"


def test_a_resumed_record_is_compared_with_the_last_steps(record):
    rest = copy.deepcopy(Record(record.ids[1:], record.masks[1:], record.losses[1:], {1: record.gradients[1]}))
    assert first_difference(record, rest) == ""
    assert agreed(record, rest) == "same samples, masks and losses of step 1, same 2 gradients of step 1"
    rest.gradients[1]["head.weight"] *= 1 + 1e-8
    assert "the gradient of head.weight at step 1 differs first" in first_difference(record, rest)
    rest.losses[0] += 1e-3
    assert first_difference(record, rest).startswith("loss of step 1")


def test_a_resumed_record_without_gradients_is_a_difference(record):
    rest = Record(record.ids[1:], record.masks[1:], record.losses[1:])
    assert first_difference(record, rest) == "the gradient of stem.weight is missing at step 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


def configured(data, tmp_path, *words):
    places = [f"data.source={data}", f"run.storage={tmp_path}"]
    return resolve(load(DoctorConfig, None, [*TINY, *places, *words]), {"ITPN_HOME": str(tmp_path)})


def states(config):
    return {finding.what: (finding.state, finding.detail) for finding in examine(config)}


def test_good_surroundings(data, tmp_path):
    found = states(configured(data, tmp_path))
    assert {state for state, _ in found.values()} == {"ok"}
    assert "train" in found["data"][1]


def test_bad_surroundings_are_named(data, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = configured(data, tmp_path, "cluster.device=cuda", "track.follow=true", "track.uri=http://127.0.0.1:9")
    config = replace(config, run=replace(config.run, storage=f"{blocked}/runs"))
    config = replace(config, data=replace(config.data, source=str(tmp_path / "nowhere")))
    found = states(config)
    assert found["storage"][0] == "FAILED"
    assert found["data"][0] == "FAILED"
    assert "nowhere" in found["data"][1]
    assert found["tracking"][0] == "warning"
    if not torch.cuda.is_available():
        assert found["devices"][0] == "FAILED"


def test_a_server_that_answers_and_one_that_must_but_does_not(data, tmp_path):
    words = ("track.follow=true", f"track.uri=sqlite:///{tmp_path}/mlflow.db")
    assert states(configured(data, tmp_path, *words))["tracking"] == ("ok", "MLflow answers")
    away = configured(data, tmp_path, "track.follow=true", "track.uri=http://127.0.0.1:9", "track.required=true")
    state, detail = states(away)["tracking"]
    assert state == "FAILED"
    assert "127.0.0.1:9" in detail
    assert "would go on without it" not in detail


@pytest.mark.parametrize(("free", "state"), [(95, "ok"), (50, "warning")])
def test_devices_are_counted_and_their_free_memory_is_looked_at(data, tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["H100", "A100"][index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * 10**9, 100 * 10**9))
    found = states(configured(data, tmp_path, "cluster.device=cuda"))["devices"]
    assert found == (state, f"2 x A100, H100; {free} of 100 GB free on the first")


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setattr(agreement, "examine", lambda config: [Finding("steps", "ok", "taken")])


def test_a_server_that_must_answer_hides_no_other_finding(data, tmp_path, capsys, no_steps):
    away = configured(data, tmp_path, "track.follow=true", "track.uri=http://127.0.0.1:9", "track.required=true")
    assert doctor(away, "test") == 1
    out = capsys.readouterr().out
    lines = {re.split(r"  +", line)[1]: line.split()[0] for line in out.splitlines() if "  " in line}
    assert (lines["tracking"], lines["data"], lines["steps"]) == ("FAILED", "ok", "ok")
    assert "settings" not in lines
    assert out.splitlines()[-1] == "1 of 8 checks failed"


def test_settings_that_do_not_go_together_are_a_finding(data, tmp_path, capsys, no_steps):
    assert doctor(configured(data, tmp_path, "eval.k=99"), "test") == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAILED +settings +eval\.bank=16 is smaller than eval\.k=99", out, re.MULTILINE)
    assert re.search(r"^ok +data ", out, re.MULTILINE)
    assert "taken" not in out


def test_a_group_that_does_not_resume_has_not_passed(data, tmp_path, monkeypatch, record):
    """The second group begins at step 0 and agrees in everything."""
    config = configured(data, tmp_path, "doctor.worlds=[1]", "doctor.steps=2")
    rest = Record(record.ids[1:], record.masks[1:], record.losses[1:], {1: record.gradients[1]})
    for second, state in ((record, "FAILED"), (rest, "ok")):
        groups = iter([record, None, second])
        monkeypatch.setattr(agreement, "run_group", lambda *_, groups=groups, **__: next(groups))
        found = {finding.what: finding for finding in agreement.examine(config)}
        assert found["kill and resume"].state == state
        if state == "FAILED":
            assert "did not resume from the checkpoint of step 1: it took 2 steps" in found["kill and resume"].detail


TEACHER = ["objective.kind=fast", "objective.target_norm=channel"]


def failed(config):
    return {what: detail for what, (state, detail) in states(config).items() if state == "FAILED"}


def test_a_teacher_that_does_not_exist(data, tmp_path, capsys):
    config = configured(data, tmp_path, *TEACHER, "objective.teacher.model=vit_tiny_patch16_225")
    found = failed(config)
    assert list(found) == ["teacher"]
    assert "is not a timm model" in found["teacher"]
    assert "vit_tiny_patch16_224" in found["teacher"], "the nearest name is offered"
    assert doctor(config, "test") == 1
    assert "none could be taken: see teacher" in capsys.readouterr().out


def test_a_teacher_without_its_weights(data, tmp_path):
    words = ["objective.teacher.model=vit_tiny_patch16_224", f"objective.teacher.weights={tmp_path}/gone.safetensors"]
    found = failed(configured(data, tmp_path, *TEACHER, *words))
    assert list(found) == ["teacher"]
    assert "gone.safetensors" in found["teacher"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_teacher_whose_numbers_are_not_finite(data, tmp_path, broken):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    if broken:
        state["blocks.0.norm1.weight"][0] = float("nan")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "teacher.safetensors")
    weights = f"objective.teacher.weights={tmp_path}/teacher.safetensors"
    found = states(configured(data, tmp_path, *TEACHER, "objective.teacher.model=vit_tiny_patch16_224", weights))
    wanted = ("FAILED", "not finite") if broken else ("ok", "192 channels on 2 x 2 cells")
    assert found["teacher"][0] == wanted[0]
    assert wanted[1] in found["teacher"][1]


@pytest.mark.parametrize("full", ["scratch", "storage"])
def test_a_disk_without_room(data, tmp_path, monkeypatch, full):
    """Room for two checkpoints where three are wanted, on the one disk or the other."""
    config = configured(data, tmp_path, "train.optimizer.average_decay=0.9")
    task = build_task(config.model, config.objective)
    checkpoint = 4 * 4 * sum(p.numel() for p in task.parameters())
    places = {"scratch": tempfile.gettempdir(), "storage": str(tmp_path)}

    def usage(place):
        return SimpleNamespace(free=2 * checkpoint if str(place) == places[full] else 3 * checkpoint)

    monkeypatch.setattr(surroundings.shutil, "disk_usage", usage)
    found = failed(config)
    assert list(found) == ["disk"]
    assert found["disk"].startswith(f"{places[full]}: ")
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * checkpoint))
    assert failed(config) == {}


class Skewed:
    """An S3 server (moto) whose clock, as its answers tell it, is `apart` seconds ahead."""

    def __init__(self, apart):
        store = DomainDispatcherApplication(create_backend_app)

        def serve(environ, start_response):
            def start(status, headers, *rest):
                return start_response(status, [(name, self.moved(name, value)) for name, value in headers], *rest)

            return store(environ, start)

        self.apart = apart
        self.server = make_server("127.0.0.1", 0, serve, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self.server.port}"

    def moved(self, name, value):
        if name.lower() != "last-modified":
            return value
        return format_datetime(parsedate_to_datetime(value) + timedelta(seconds=self.apart), usegmt=True)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(("apart", "state"), [(0, "ok"), (60, "FAILED"), (-60, "FAILED")])
def test_a_clock_that_differs_from_the_storages(data, tmp_path, monkeypatch, apart, state):
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with Skewed(apart) as store:
        words = ["run.storage=s3://runs/mine", f"data.store.endpoint={store.endpoint}"]
        found = states(configured(data, tmp_path, *words))
    assert found["storage"][0] == "ok", found["storage"]
    assert found["clock"][0] == state
    told = float(re.search(r"differs by ([\d.]+) s", found["clock"][1])[1])
    assert told == pytest.approx(abs(apart), abs=4)
    assert ("signatures and leases need 5" in found["clock"][1]) is (state == "FAILED")


@pytest.mark.long
def test_a_whole_examination(data, tmp_path, capsys):
    config = configured(data, tmp_path, "train.micro_batch=4")
    assert config.doctor.worlds == (1, 2, 4)
    assert doctor(config, "test") == 0
    text = capsys.readouterr().out
    found = {re.split(r"  +", line)[1]: line for line in text.splitlines() if "same samples" in line}
    assert list(found) == ["2 ranks", "4 ranks", "kill and resume"]
    for what in ("2 ranks", "4 ranks"):
        assert "same samples, masks and losses of steps 0 to 2" in found[what]
        assert re.search(r"same \d\d+ gradients of step 0$", found[what])
    assert "same samples, masks and losses of steps 1 to 2" in found["kill and resume"]
    assert re.search(r"same \d\d+ gradients of step 1$", found["kill and resume"])
    assert "checks passed" in text


def test_micro_batches_are_added_up_where_the_recipe_does_so(data, tmp_path):
    for asked, taken in ((0, 0), (1, 1), (64, 2)):
        config = configured(data, tmp_path, f"train.micro_batch={asked}", "doctor.worlds=[1,2]")
        assert _short(config).train.micro_batch == taken


FAULT = 1 + 1e-7


@dataclass(frozen=True)
class SpoiltOnResume(DoctorConfig):
    """Settings that, where a spawned rank unpacks them, spoil one gradient of the first step after a resume."""

    def __setstate__(self, state):
        self.__dict__.update(state)
        if multiprocessing.current_process().name == "MainProcess":
            return
        restore = Engine.restore

        def restored(engine):
            restore(engine)
            if engine.state.step:
                take = engine.state.parallel.take_gradients

                def spoilt():
                    take()
                    engine.state.parallel.trainable[-1][1].grad.mul_(FAULT)

                engine.state.parallel.take_gradients = spoilt

        Engine.restore = restored


@pytest.mark.long
def test_a_fault_in_only_the_resumed_gradient_is_named(data, tmp_path):
    config = configured(data, tmp_path, "doctor.worlds=[1]", "doctor.steps=2")
    found = {f.what: f for f in agreement.examine(SpoiltOnResume(**vars(config)))}
    assert found["1 ranks"].state == "ok"
    assert found["kill and resume"].state == "FAILED"
    with Engine(_short(config), Silent(tmp_path / "look")) as engine:
        name = engine.state.parallel.trainable[-1][0]
    assert found["kill and resume"].detail.startswith(f"the gradient of {name} at step 1 differs first, by 1.0e-07")


@pytest.mark.long
def test_a_group_that_does_not_end_in_time_is_a_failure(data, tmp_path, capsys):
    config = configured(data, tmp_path, "doctor.worlds=[1,2]", "doctor.timeout_s=0.01")
    assert doctor(config, "test") == 1
    assert "not within 0.01 s" in capsys.readouterr().out
