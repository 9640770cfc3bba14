"""A run's folder in a bucket whose credentials are withdrawn while its client lives."""

import pytest

from orchestrator.data.folder import Folder, StorageError
from orchestrator.data.store import StoreConfig
from tests.faults.gate import Gate


@pytest.fixture
def gate(tmp_path, monkeypatch):
    with Gate() as gate:
        for name, value in gate.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        gate.client.create_bucket(Bucket="runs")
        yield gate


def test_every_request_reads_withdrawn_credentials_again(gate, tmp_path):
    requests = {
        "put": lambda folder: folder.put("new", b"1"),
        "get": lambda folder: folder.get("there"),
        "download": lambda folder: folder.download("there", tmp_path / "here"),
        "exists": lambda folder: folder.exists("there"),
        "modified": lambda folder: folder.modified("there"),
        "names": lambda folder: folder.names(),
        "delete": lambda folder: folder.delete(["new"]),
        "delete_tree": lambda folder: folder.delete_tree("there"),
    }
    folder = Folder("s3://runs/one", StoreConfig(endpoint=gate.endpoint))
    folder.put("there", b"1")
    for name, request in requests.items():
        gate.key = name
        request(folder)
        assert name in gate.signed_by


def test_a_refusal_that_stays_is_an_error(gate):
    folder = Folder("s3://runs/two", StoreConfig(endpoint=gate.endpoint))
    gate.refuse = lambda method, path: method == "PUT"
    with pytest.raises(StorageError, match="access refused"):
        folder.put("new", b"1")
