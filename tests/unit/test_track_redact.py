import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.track.config import TrackConfig
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import HIDDEN, Redactor, flatten, names_a_secret, secret_values

SECRET_NAMES = [
    "password", "db.password", "DB_PASSWORD", "store.secret_key", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN", "HF_TOKEN", "api-key", "apikey", "auth.token", "token", "client_secret", "credentials",
    "MLFLOW_FLASK_SERVER_SECRET_KEY", "private_key", "Authorization", "passphrase", "sas_url",
]  # fmt: skip
PLAIN_NAMES = [
    "num_tokens", "token_migration", "model.tokens", "keep_tokens", "key", "monkey", "author", "seed", "mask_keys",
    "secretary.count", "data.source", "authors", "tokenizer",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name):
    assert names_a_secret(name)
    assert Redactor().value(name, "hunter2") == HIDDEN


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_plain_names(name):
    assert not names_a_secret(name)
    assert Redactor().value(name, "7") == "7"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg2://mlflow:s3cr3tpw@db:5432/mlflow",
        "s3://bucket/x?X-Amz-Signature=s3cr3tpw&y=1",
        "https://host/x?sig=s3cr3tpw",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + "s3cr3tpw" * 5,
        "hf_" + "s3cr3tpw" * 4,
        "-----BEGIN RSA PRIVATE KEY-----\ns3cr3tpw\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzM2NyM3Rwdw.s3cr3tpw",
    ],
)
def test_what_looks_like_a_credential_is_hidden_whatever_its_name(text):
    hidden = Redactor().value("data.source", text)
    assert HIDDEN in hidden
    assert "s3cr3tpw" not in hidden
    assert "AKIA" not in hidden


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        ("password: hunter2", f"password: {HIDDEN}"),
        ('  "api_key": "hunter2",', f'  "api_key": "{HIDDEN}",'),
        ("export HF_TOKEN=hunter2", f"export HF_TOKEN={HIDDEN}"),
        ("password: null", "password: null"),
        ("num_tokens: 196", "num_tokens: 196"),
        ("url: http://user:hunter2@host/", f"url: http://{HIDDEN}@host/"),
    ],
)
def test_files_lose_their_credentials(line, hidden):
    assert Redactor().text(line) == hidden


@given(st.text(min_size=6, max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_known_secret_never_passes(secret, before, after):
    assert secret not in Redactor([secret]).shapes(f"{before} {secret} {after}").replace(HIDDEN, "")


def test_secrets_of_the_environment_are_found_by_name():
    environ = {"HF_TOKEN": "abcdefgh", "HOME": "/home/me", "SHORT_TOKEN": "x", "DB_PASSWORD": "longenough"}
    assert set(secret_values(environ)) == {"abcdefgh", "longenough"}


def test_planted_secrets_reach_no_byte_of_the_journal(tmp_path):
    planted = "Zq7-planted-secret"
    recorder = Recorder(
        TrackConfig(uri=f"http://me:{planted}@127.0.0.1:9"), "uid", tmp_path, secrets=[planted], follow=False
    )
    recorder.params({"a": {"password": planted}, "b": f"x{planted}y", "c": [planted]})
    recorder.tags({"note": planted})
    recorder.describe(f"run with {planted}")
    recorder.dataset("d", "1", f"s3://u:{planted}@h/b", "training", {})
    recorder.text("config.yaml", f"uri: {planted}\n")
    recorder.state("failed", f"could not log in with {planted}")
    backlog = recorder.close(0)
    assert planted not in str(backlog)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert [path for path in written if planted.encode() in path.read_bytes()] == []


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": None}) == {"a.b": 1, "a.c.d": (1, 2), "e": None}
