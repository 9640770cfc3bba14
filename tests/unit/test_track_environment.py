import shutil
import subprocess

import pytest

from orchestrator.track import environment
from orchestrator.track.environment import code_identity, driver_facts, environment_text, source_hash


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "copy"
    for package in ("itpn_core", "orchestrator", "jobs"):
        (root / package).mkdir(parents=True)
        (root / package / "code.py").write_text("answer = 42\n")
    return root


def git(root, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, "-C", str(root), *words], check=True, capture_output=True, text=True
    ).stdout


def test_a_shipped_copy_is_known_by_its_hash_and_the_commit_it_was_given(source):
    bare = code_identity("", source)
    assert (bare.commit, bare.state) == ("unknown", "unknown")
    assert code_identity("abc123", source).commit == "abc123"
    (source / "jobs" / "code.py").write_text("answer = 43\n")
    assert source_hash(source) != bare.source


def test_a_copy_inside_somebody_elses_repository_is_not_that_repository(source):
    git(source.parent, "init", "-q")
    assert code_identity("", source).commit == "unknown"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_repository_says_commit_and_changes(source):
    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "commit", "-qm", "first")
    clean = code_identity("ignored", source)
    assert clean.commit == git(source, "rev-parse", "HEAD").strip()
    assert (clean.state, clean.diff) == ("clean", "")
    (source / "jobs" / "code.py").write_text("answer = 43\n")
    dirty = code_identity("", source)
    assert dirty.state == "dirty (1 files)"
    assert "+answer = 43" in dirty.diff


def test_no_git_is_unknown_not_an_error(source, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    facts = driver_facts({}, source)
    assert facts["git.commit"] == "unknown"
    assert "mlflow.source.git.commit" not in facts
    assert len(facts["source.sha256"]) == 64


def test_the_text_names_versions_and_hardware():
    lines = dict(line.split(maxsplit=1) for line in environment_text().splitlines() if line)
    assert lines["torch"].startswith("2.")
    assert int(lines["cores"]) >= 1
    assert lines["processor"]
