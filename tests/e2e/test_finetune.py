"""Pre-training, then fine-tuning from it, as a person runs them: real Ray, two workers, real MLflow."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.config.tree import FinetuneConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training
from tests.support import TINY, TINY_CLASSIFIER, job_environment, write_home

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "jobs" / "recipes" / "finetune_first_run.yaml")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def run(home, job, tiny, *words):
    settings = [word for word in tiny if not word.startswith("track.follow")]
    return subprocess.run(
        [sys.executable, f"jobs/{job}.py", *settings, "cluster.workers=2", *words],
        cwd=ROOT, env=job_environment(home),
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_fine_tunes_a_pretrained_run_and_knows_when_it_is_done(home):
    first = run(home, "pretrain", TINY, "run.name=first", "train.epochs=1")
    assert first.returncode == 0, first.stdout + first.stderr
    words = ("--init", f"{home}/runs/first", "run.name=tuned", "eval.every_epochs=1")
    done = run(home, "finetune", TINY_CLASSIFIER, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("backbone.safetensors", "top-1", "top-5", "val images, 4 classes", "loss", "make ui"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr

    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    runs = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    recorded = next(r for r in runs if r.info.run_name == "tuned")
    assert recorded.info.status == "FINISHED"
    assert {"train/loss", "eval/top1", "eval/top5"} <= recorded.data.metrics.keys()
    kept = {a.path for a in client.list_artifacts(recorded.info.run_id)}
    assert {"config.yaml", "figures", "classes", "weights"} <= kept
    assert any("confusion" in a.path for a in client.list_artifacts(recorded.info.run_id, "figures"))

    again = run(home, "finetune", TINY_CLASSIFIER, *words)
    assert again.returncode == 0
    assert "finished already" in again.stdout
    scratch = run(home, "finetune", TINY_CLASSIFIER, *words[2:])
    assert scratch.returncode == 2
    assert "init.weights: was" in scratch.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--init", "/nowhere"], ["/nowhere", "no such file"]),
        (["finetune.mixupp=1"], ["finetune.mixup"]),
        (["finetune.mixup=-1"], ["finetune.mixup", "-1", "negative"]),
        (["data.augment.rand_magnitude=11"], ["data.augment.rand_magnitude", "11"]),
        (["eval.images=100000"], ["eval.images=100000", "val"]),
        (["train.optimizer.layer_decay=2"], ["train.optimizer.layer_decay=2"]),
        (["init.keep_head=true"], ["init.keep_head", "init.checkpoint"]),
        (["data.source=/nowhere"], ["/nowhere", "make_shards"]),
        (["objective.kind=fast"], ["objective.kind"]),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(home, words, expected, monkeypatch, capsys):
    monkeypatch.setenv("ITPN_HOME", str(home))
    arguments = [*TINY_CLASSIFIER, "cluster.workers=2", *words]
    short = {"--init": "init.checkpoint"}
    code = run_job(FinetuneConfig, "", RECIPE, run_training, resolve, arguments, short)
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.err.startswith("error: ")
    for part in expected:
        assert part in shown.err
