"""Doctor: what it compares, what it finds in bad surroundings, and a whole examination."""

import copy
from dataclasses import replace

import pytest
import torch

from orchestrator.config.load import load
from orchestrator.doctor.agreement import first_difference
from orchestrator.doctor.config import DoctorConfig
from orchestrator.doctor.doctor import doctor
from orchestrator.doctor.surroundings import examine
from orchestrator.doctor.walk import Record
from orchestrator.launch.home import resolve
from tests.support import TINY, write_shards


@pytest.fixture
def record():
    torch.manual_seed(0)
    return Record(
        ids=[[1, 2], [3, 4]],
        masks=[torch.rand(2, 4) < 0.5 for _ in range(2)],
        losses=[1.0, 0.5],
        gradients={
            "stem.weight": torch.rand(3, dtype=torch.float64),
            "head.weight": torch.rand(3, dtype=torch.float64),
        },
    )


def test_equal_records_have_no_difference(record):
    assert first_difference(record, copy.deepcopy(record)) == ""


def test_the_first_difference_is_named(record):
    other = copy.deepcopy(record)
    other.gradients["head.weight"][1] *= 1 + 1e-8
    assert "the gradient of head.weight differs first" in first_difference(record, other)
    other.gradients["stem.weight"] += 1e-6
    assert "the gradient of stem.weight differs first" in first_difference(record, other)
    other.losses[1] += 1e-6
    assert first_difference(record, other).startswith("loss of step 1")
    other.masks[1] = ~other.masks[1]
    assert first_difference(record, other) == "masks of step 1"
    other.ids[0] = [2, 1]
    assert first_difference(record, other).startswith("sample ids of step 0: [2, 1]")


def test_not_a_number_is_a_difference(record):
    other = copy.deepcopy(record)
    other.losses[0] = float("nan")
    assert first_difference(record, other).startswith("loss of step 0")
    other = copy.deepcopy(record)
    other.gradients["stem.weight"][0] = float("nan")
    assert "stem.weight" in first_difference(record, other)


def test_a_resumed_record_is_compared_with_the_last_steps(record):
    rest = Record(record.ids[1:], record.masks[1:], record.losses[1:], {"stem.weight": torch.zeros(3)})
    assert first_difference(record, rest) == ""
    rest.losses[0] += 1e-3
    assert first_difference(record, rest).startswith("loss of step 1")


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


@pytest.mark.long
def test_a_whole_examination(data, tmp_path, capsys):
    config = configured(data, tmp_path, "doctor.worlds=[1,2]")
    assert doctor(config, "test") == 0
    text = capsys.readouterr().out
    assert "2 ranks" in text
    assert "kill and resume" in text
    assert text.count("same samples, masks, losses and gradients") == 2
    assert "checks passed" in text


@pytest.mark.long
def test_a_group_that_does_not_end_in_time_is_a_failure(data, tmp_path, capsys):
    config = configured(data, tmp_path, "doctor.worlds=[1,2]", "doctor.timeout_s=0.01")
    assert doctor(config, "test") == 1
    assert "not within 0.01 s" in capsys.readouterr().out
