"""What a job prints: its configuration and its end table, which Ray keeps as the job's output."""

from dataclasses import asdict

from orchestrator.config.tree import PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.cli import run_job
from orchestrator.launch.finish import end_table
from orchestrator.launch.home import resolve
from orchestrator.train.outcome import Outcome
from tests.support import tiny_config

ADDRESS = "http://me:hunter2hunter2@127.0.0.1:5000"


def test_a_printed_configuration_hides_credentials(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "planted-7f3a9c51")
    settings = [f"track.uri={ADDRESS}", "track.description=asked with planted-7f3a9c51"]
    assert run_job(PretrainConfig, "", "", lambda *_: 1, resolve, ["--print-config", *settings]) == 0
    shown = capsys.readouterr().out
    assert "@127.0.0.1:5000" in shown
    assert "asked with" in shown
    assert "hunter2" not in shown
    assert "planted" not in shown


def test_the_end_table_hides_the_password_of_the_tracking_address(tmp_path):
    config = tiny_config("shards", tmp_path, f"track.uri={ADDRESS}")
    outcome = Outcome(
        step=1, stopped="", seconds=1.0, first_loss=1.0, last_loss=1.0, images_per_second=1.0, mfu=0.0, goodput="",
        restarts=0, redone_steps=0, scores={}, differences=[], protocol="",
    )  # fmt: skip
    shown = end_table(config, Folder(str(tmp_path)), asdict(outcome))
    assert "@127.0.0.1:5000" in shown
    assert "hunter2" not in shown
