"""What the driver asks of every node before a run: versions, storage, data; and its words for what is wrong."""

import errno
import re
import socket
import time
from dataclasses import replace

import pytest

from orchestrator.data.folder import Folder
from orchestrator.data.manifest import Manifest
from orchestrator.launch.nodes import Question, answer, compare, versions
from orchestrator.launch.record import KEY
from orchestrator.track.config import TrackConfig, why_away
from tests.support import tiny_config, write_shards


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    config = tiny_config(write_shards(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("storage"))
    uri = f"{config.run.storage}/tiny"
    Folder(uri).put(KEY, b"{}")
    return Question(config, uri, KEY, Manifest.load(config.data.source).fingerprint, versions(), "driver")


def test_a_node_that_sees_what_the_driver_sees_is_fit(question):
    found = answer(question)
    assert found.trouble == ""
    assert compare(found, question, "10.0.0.1") == ""
    assert set(found.versions) == {"python", "ray", "torch", "source code"}


@pytest.mark.parametrize("name", ["python", "ray", "torch", "source code"])
def test_a_node_with_another_version_is_named(question, name):
    other = replace(answer(question), versions={**versions(), name: "0.1"})
    said = compare(other, question, "10.0.0.1")
    assert re.match(rf"node 10\.0\.0\.1 \(host .*\) has {name} 0\.1, the driver has .*--working-dir", said)


def test_a_node_without_the_runs_folder_is_named_and_nothing_is_made_there(question, tmp_path):
    elsewhere = str(tmp_path / "runs" / "tiny")
    found = answer(replace(question, folder_uri=elsewhere))
    assert "does not see run.storage=" in found.trouble
    assert "s3://bucket/runs or a shared mount" in found.trouble
    assert not (tmp_path / "runs").exists()
    assert not found.away
    assert re.match(r"node 10\.0\.0\.1 .*does not see run\.storage", compare(found, question, "10.0.0.1"))


def test_a_node_that_reads_no_or_other_data_is_named(question, tmp_path):
    nowhere = replace(question.config, data=replace(question.config.data, source=str(tmp_path)))
    assert "cannot read data.source=" in answer(replace(question, config=nowhere)).trouble
    assert "sees other data at data.source=" in answer(replace(question, manifest="0" * 64)).trouble


def test_a_node_whose_disk_fails_in_any_way_is_not_fit(question, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Manifest, "load", stale)
    found = answer(question)
    assert found.trouble.startswith("cannot read data.source=")
    assert "Stale file handle" in found.trouble
    assert found.away


def test_a_node_from_which_storage_only_swallows_packets_says_so_in_time(question, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = replace(question.config.data.store, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        config = replace(
            question.config, data=replace(question.config.data, store=store),
            run=replace(question.config.run, storage="s3://bucket/runs"),
        )  # fmt: skip
        began = time.monotonic()
        found = answer(replace(question, config=config, folder_uri="s3://bucket/runs/tiny", reach_s=2.0))
        assert time.monotonic() - began < 10
    assert found.away
    assert found.trouble == (
        "cannot reach run storage (run.storage=s3://bucket/runs), which the driver can: no answer within 2 s"
    )
    assert Question.reach_s <= 20, "the default is a matter of seconds too"


# -- tracking ----------------------------------------------------------------------------------------------------------


def test_only_a_server_that_cannot_be_reached_is_worth_a_warning():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        away = why_away(TrackConfig(uri=uri))
        assert "127.0.0.1" in away
        assert "secret" not in away
        server.listen()
        assert why_away(TrackConfig(uri=uri)) == ""
    assert why_away(TrackConfig(uri=uri, follow=False)) == ""
    assert why_away(TrackConfig(uri="sqlite:////tmp/x.db")) == ""
