"""Sweeps as a person runs them: real Ray Tune, real kills, trials that misbehave, Ray Train inside Tune."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.checkpoint.runlog import RELEASED, RunLog
from orchestrator.config.identity import result_fields
from orchestrator.config.load import load
from orchestrator.config.tree import EvaluateConfig, PretrainConfig
from orchestrator.data.folder import Folder
from orchestrator.launch.record import open_record
from orchestrator.train.loop import train
from tests.support import TINY, LocalRun, tiny_config, write_shards

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)
SPACE = """
sweep:
  space:
    drops: {choices: [0, 1]}
    model:
      migration:
        layers[0]: {choices: [0, 1], when: {drops: 1}}
        keep[0]: {choices: [0.5, 0.75, 0.9], when: {drops: 1}}
      gathering:
        window: {choices: [0, 2, 4]}
        tokens: {choices: [1, 4], when: {model.gathering.window: [2, 4]}, otherwise: 4}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished tiny run, its data, and a recipe."""
    root = tmp_path_factory.mktemp("home")
    config = tiny_config(write_shards(root), root / "runs", "train.max_steps=2")
    run = LocalRun(config)
    open_record(run.folder, result_fields(config, "any"), "tiny").next_attempt().save(run.folder)
    train(config, run)
    (root / "recipe.yaml").write_text(SPACE)
    return root, config.data.source


def environment(root):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return {**clean, "ITPN_HOME": str(root), "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}


def command(home, script, *words):
    root, data = home
    common = [
        f"data.source={data}", f"run.storage={root}/runs", f"track.uri=sqlite:///{root}/runs/mlflow.db",
        "cluster.device=cpu", "eval.k=3", "eval.batch=8",
    ]  # fmt: skip
    return [sys.executable, *script, "--recipe", str(root / "recipe.yaml"), *common, *words]


MEASURE = ["evaluate.checkpoint=tiny", "model.img_size=64", "eval.bank=24", "eval.queries=8", "evaluate.batch=2",
           "evaluate.rounds=2", "evaluate.warmup=0", "sweep.startup=3"]  # fmt: skip


def ends(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("trials/*/end.json")}


def children(root, name):
    client = MlflowClient(f"sqlite:///{root}/runs/mlflow.db")
    runs = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id], max_results=1000)]
    parent = next(r for r in runs if r.info.run_name == name)
    below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return client, parent, below


@pytest.mark.long
def test_a_killed_sweep_resumes_with_every_trial_and_ends_with_recommendations(home):
    root, _ = home
    folder = root / "runs" / "measured"
    words = command(home, ["jobs/sweep.py"], *MEASURE, "run.name=measured", "sweep.trials=6")
    with subprocess.Popen(words, cwd=ROOT, env=environment(root), stdout=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + 400
        while len(ends(folder)) < 2:
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
    kept = ends(folder)
    done = subprocess.run(words, cwd=ROOT, env=environment(root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trials have ended and are not run again" in done.stdout
    found = ends(folder)
    assert {name: found.get(name) for name in kept} == kept
    assert sorted(found) == [f"{number:06d}" for number in range(6)]
    settings = [json.loads((folder / "trials" / name / "asked.json").read_text())["values"] for name in found]
    assert len({json.dumps(values, sort_keys=True) for values in settings}) == 6

    results = folder / "results"
    for name in ("front.csv", "trials.csv", "front.md", "sweep.html", "sweep.png", "summary.json"):
        assert (results / name).stat().st_size > 0, name
    recipes = sorted(results.glob("recommended-*.yaml"))
    assert {path.stem for path in recipes} >= {"recommended-knee", "recommended-accurate"}
    for path in recipes:
        load(PretrainConfig, path, [])
        load(EvaluateConfig, path, [])
    client, parent, below = children(root, "measured")
    assert parent.info.status == "FINISHED"
    assert len(below) == 6
    assert all(run.data.metrics["accuracy"] >= 0 for run in below)
    assert "results" in {item.path for item in client.list_artifacts(parent.info.run_id)}

    check = [sys.executable, "jobs/evaluate.py", "--recipe", str(recipes[0]), "--checkpoint", str(root / "runs/tiny")]
    more = [f"data.source={home[1]}", "evaluate.rounds=0", "track.follow=false", "--knn"]
    used = subprocess.run([*check, *more], cwd=ROOT, env=environment(root), capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stdout + used.stderr
    accepted = subprocess.run(
        [sys.executable, "jobs/pretrain.py", "--recipe", str(recipes[0]), "--print-config"],
        cwd=ROOT, env=environment(root), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.long
def test_a_terminated_sweep_ends_in_order_and_gives_its_lease_back(home):
    """What `ray job stop` sends."""
    root, _ = home
    folder = root / "runs" / "ended"
    words = command(home, ["jobs/sweep.py"], *MEASURE, "run.name=ended", "sweep.trials=6")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=ROOT, env=environment(root), **pipes) as driver:
        deadline = time.monotonic() + 400
        while not ends(folder):
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        driver.send_signal(signal.SIGTERM)
        text = driver.stdout.read()
    assert driver.returncode == 0, text
    assert re.search(r"stopped with \d trials left. Type the same command again to go on", text), text
    assert "Traceback" not in text
    assert children(root, "ended")[1].info.status == "KILLED"
    assert json.loads((folder / "run.json").read_text())["finished"] is False
    assert RunLog(Folder(str(folder))).last().kind == RELEASED


@pytest.mark.long
def test_trials_that_raise_hang_or_exhaust_memory_do_not_stop_a_sweep(home):
    root, _ = home
    words = command(
        home, ["-m", "tests.e2e.bad_trials"], *MEASURE, "run.name=bad", "sweep.trials=6", "sweep.sampler=random",
        "sweep.timeout_s=75", "sweep.retries=0",
    )  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, env=environment(root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {int(name): json.loads(body) for name, body in ends(root / "runs" / "bad").items()}
    assert sorted(found) == list(range(6))
    states = [found[number]["state"] for number in range(6)]
    assert states == ["finished", "failed", "failed", "infeasible", "failed", "finished"]
    for number, part in ((1, "ValueError: raised"), (2, "sweep.timeout_s=75"), (3, "out of memory"), (4, "died")):
        assert part in found[number]["error"], found[number]["error"]


@pytest.mark.cluster
def test_six_trials_train_through_ray_train_inside_tune_on_two_cpus(home):
    root, _ = home
    tiny = [word for word in TINY if not word.startswith(("track", "cluster", "eval"))]
    words = command(
        home, ["jobs/sweep.py"], *tiny, "eval.bank=16", "eval.every_epochs=1", "eval.figure_images=0",
        "run.name=trained", "sweep.mode=train", "sweep.trials=6", "sweep.objectives=[accuracy,gflops]",
        "track.system_every_s=0", "cluster.workers=1",
    )  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, env=environment(root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(body) for body in ends(root / "runs" / "trained").values()]
    assert [end["state"] for end in found].count("finished") == 6, [end["error"] for end in found]
    assert all(len(end["details"]["curve"]) == 2 for end in found)
    _, parent, below = children(root, "trained")
    assert parent.info.status == "FINISHED"
    assert len(below) == 6
    assert all("train/loss" in run.data.metrics and "gflops" in run.data.metrics for run in below)
