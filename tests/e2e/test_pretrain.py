"""The job as a person runs it: real Ray, two workers, real shards, real MLflow."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mlflow import MlflowClient

from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.run import run_training
from orchestrator.train.loop import train
from tests.support import TINY, LocalRun, job_environment, losses, write_home

ROOT = Path(__file__).resolve().parents[2]
FIRST_RUN = str(ROOT / "jobs" / "recipes" / "first_run.yaml")
LONG = ("train.epochs=12", "train.log_every=1", "eval.queries=8")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("root"))


def train_undisturbed(rank, port, home):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # as Ray has it for a worker of one CPU
    dist.init_process_group("gloo", rank=rank, world_size=2)
    words = [*TINY, "cluster.workers=2", "run.name=undisturbed", *LONG]
    config = resolve(load(PretrainConfig, FIRST_RUN, words), {"ITPN_HOME": str(home)})
    train(config, LocalRun(config, rank, 2))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(home):
    """Losses by step of two ranks that nobody stopped, without Ray."""
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(train_undisturbed, (29661, home), nprocs=2, start_method="forkserver")
    found = curve(home, "undisturbed")
    assert sorted(found) == list(range(1, max(found) + 1))
    return found


def curve(home, name):
    return losses(SimpleNamespace(directory=home / "runs" / name))


def command(*words):
    settings = [word for word in TINY if not word.startswith("track.follow")]
    return [sys.executable, "jobs/pretrain.py", *settings, "cluster.workers=2", *words]


def run(home, *words, timeout=500):
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        env=job_environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def mlflow_run(home, name):
    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    found = [
        r for e in client.search_experiments() for r in client.search_runs([e.experiment_id]) if r.info.run_name == name
    ]
    assert len(found) == 1
    return client, found[0]


def test_pretrains_evaluates_tracks_and_knows_when_it_is_done(home):
    done = run(home, "run.name=whole", "eval.baselines=true", "eval.every_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        "k-NN untrained",
        "k-NN trained",
        "k-NN raw pixels",
        "loss",
        "images/s",
        "time of all ranks",
        "make ui",
    ):
        assert part in done.stdout
    assert "Traceback" not in done.stderr

    client, recorded = mlflow_run(home, "whole")
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["model.embed_dim"] == "32"
    for name in ("manifest.sha256", "git.commit", "run.state", "source.sha256"):
        assert recorded.data.tags[name]
    steps = [m.step for m in client.get_metric_history(recorded.info.run_id, "train/loss")]
    assert steps == list(range(1, max(steps) + 1))
    for name in ("train/lr", "train/grad_norm", "train/images_per_second", "eval/knn_top1", "data/wait_fraction"):
        assert name in recorded.data.metrics
    assert 0 < recorded.data.metrics["goodput/share/compute"] < 1
    assert 0 <= recorded.data.metrics["goodput/share/unaccounted"] < 0.05
    kept = {a.path for a in client.list_artifacts(recorded.info.run_id)}
    assert {"config.yaml", "environment.txt", "figures", "weights"} <= kept

    again = run(home, "run.name=whole", "eval.baselines=true", "eval.every_epochs=1")
    assert again.returncode == 0
    assert "finished already" in again.stdout

    other = run(home, "run.name=whole", "eval.baselines=true", "eval.every_epochs=1", "train.seed=7")
    assert other.returncode == 2
    assert "train.seed: was 0, now 7" in other.stderr


@pytest.mark.long
def test_killed_driver_resumes_and_says_from_where(home, undisturbed):
    words = ("run.name=killed", *LONG, "checkpoint.every_steps=1")
    checkpoints = home / "runs" / "killed" / "checkpoints"
    with subprocess.Popen(
        command(*words), cwd=ROOT, env=job_environment(home), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        deadline = time.monotonic() + 300
        while len(list(checkpoints.glob("step-*/COMMITTED.json"))) < 2:
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
    done = run(home, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 2" in done.stdout
    assert "resumed from the checkpoint of step" in done.stdout
    client, recorded = mlflow_run(home, "killed")
    steps = [m.step for m in client.get_metric_history(recorded.info.run_id, "train/loss")]
    assert sorted(steps) == sorted(set(steps)) == list(range(1, max(steps) + 1))
    assert curve(home, "killed") == undisturbed


def stop_by(home, number, words):
    """Starts a run and sends it a signal as soon as it trains; what it printed."""
    lines = []
    with subprocess.Popen(
        command(*words), cwd=ROOT, env=job_environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as driver:  # fmt: skip
        for line in driver.stdout:
            lines.append(line)
            if line.startswith("training"):
                driver.send_signal(number)
                break
        lines += driver.stdout.readlines()
    text = "".join(lines)
    assert driver.returncode == 0, text
    assert f"stopped ({number.name}) at step" in text
    assert "Traceback" not in text
    return text


@pytest.mark.long
def test_signals_save_and_the_same_command_goes_on_to_the_same_losses(home, undisturbed):
    words = ("run.name=stopped", *LONG)
    stop_by(home, signal.SIGINT, words)
    _, recorded = mlflow_run(home, "stopped")
    assert recorded.info.status == "KILLED"
    assert "resumed from the checkpoint" in stop_by(home, signal.SIGTERM, words)
    _, recorded = mlflow_run(home, "stopped")
    assert recorded.info.status == "KILLED"
    done = run(home, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from the checkpoint" in done.stdout
    assert curve(home, "stopped") == undisturbed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["model.img_size=65"], ["img_size=65", "patch_size"]),
        (["train.global_batch=1"], ["train.global_batch=1", "cluster.workers=2"]),
        (["data.val_split=test"], ["test", "train", "val"]),
        (["data.source=/nowhere"], ["/nowhere", "make_shards"]),
        (["eval.bank=100000"], ["eval.bank=100000"]),
        (["cluster.device=tpu"], ["cluster.device", "auto, cpu, cuda"]),
        (["train.optimizer.lr=fast"], ["train.optimizer.lr", "float"]),
        (["objective.kind=mae"], ["objective.kind", "fast, ema, clip, pixel"]),
        (["objective.kind=pixel"], ["model.family"]),
        (["--recipe", "/nowhere.yaml"], ["/nowhere.yaml"]),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(home, words, expected, monkeypatch, capsys):
    monkeypatch.setenv("ITPN_HOME", str(home))
    code = run_job(PretrainConfig, "", FIRST_RUN, run_training, resolve, [*TINY, "cluster.workers=2", *words])
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.err.startswith("error: ")
    for part in expected:
        assert part in shown.err


def test_a_mistake_prints_no_traceback(home):
    done = run(home, "train.epoch=3", timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: unknown key 'train.epoch' (value 3, command line). Did you mean 'train.epochs'? --help lists every key."
    ]


def test_print_config_reads_back(home, tmp_path):
    first = run(home, "--print-config", timeout=120)
    assert first.returncode == 0
    (tmp_path / "again.yaml").write_text(first.stdout)
    second = subprocess.run(
        [sys.executable, "jobs/pretrain.py", "--recipe", str(tmp_path / "again.yaml"), "--print-config"],
        cwd=ROOT, env=job_environment(home), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert second.stdout == first.stdout


def test_help_lists_settings_with_meaning(home):
    done = run(home, "--help", timeout=120)
    assert done.returncode == 0
    assert "train.global_batch  (int, default 256)" in done.stdout
    assert "images per optimizer step over all workers" in done.stdout
