"""What a reviewer sees in MLflow's UI, read and clicked in a real headless Chromium.

Screenshots are left in the test's temporary directory (pytest --basetemp=DIR keeps them where you want).
"""

import dataclasses
import math

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from itpn_core.models import ModelConfig, build_backbone
from orchestrator.track.config import TrackConfig
from orchestrator.track.describe import model_card, run_description
from orchestrator.track.figures import feature_figure
from orchestrator.track.recorder import Recorder
from tests.contract.browser import CHROMIUM, Browser
from tests.faults.track_server import MlflowServer

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
    # MLflow's client leaves its connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
MODEL = ModelConfig(embed_dim=64, depths=(1, 1, 2), img_size=32)
EXPERIMENT, REGISTERED = "photos 32px", "itpn-photos"


def record(folder, uri, number, lr):
    """A short run with everything that a run of the engine leaves."""
    name, directory = f"small-{number}", folder / f"small-{number}"
    config = TrackConfig(uri=uri, experiment=EXPERIMENT, registered_model=REGISTERED, poll_s=0.1)
    recorder = Recorder(config, f"uid-{number}", directory, name=name)
    recorder.state("running")
    recorder.params({"train": {"lr": lr, "epochs": 3}, "model": dataclasses.asdict(MODEL)})
    recorder.tags({"recipe": "small", "git.commit": "0123abcd", "manifest.sha256": "ab" * 32})
    recorder.describe(run_description(
        purpose="Does it learn?", recipe="small", model="fast width 64", objective="features of EfficientNet-Lite0",
        data="600 photographs", length="3 epochs", run_directory="runs/small",
    ))  # fmt: skip
    recorder.dataset("photos/train", "d1d2d3", "/data/photos", "training", {"samples": 600})
    recorder.text("config.yaml", f"train:\n  lr: {lr}\n")
    for step in range(1, 201):
        recorder.metrics(step, {"train/loss": (2 + lr) / math.sqrt(step), "train/lr": lr * (1 - step / 200)})
    recorder.metrics(200, {"system/node0/cpu_utilization_percentage": 50.0})
    recorder.metrics(200, {"eval/knn_top1": 0.8 + lr})
    images = torch.rand(3, 3, 32, 32)
    teacher = torch.randn(3, 16, 8, 8)
    parts = {"input": images, "mask": (torch.rand(3, 1, 8, 8) < 0.4).float(), "teacher": teacher, "student": teacher}
    feature_figure(directory / "figures" / "features-000200.png", parts, step=200, title=name)
    recorder.artifact(directory / "figures" / "features-000200.png", "figures")
    weights = directory / "final" / "backbone.safetensors"
    weights.parent.mkdir()
    save_file({key: value.contiguous() for key, value in build_backbone(MODEL).state_dict().items()}, weights)
    settings, figures = dataclasses.asdict(MODEL), {"eval/knn_top1": 0.8 + lr}
    card = model_card(name=name, model=settings, data="600 photographs", metrics=figures, run_uid=f"uid-{number}")
    recorder.model(weights, settings, step=200, mean=(0.5,) * 3, std=(0.5,) * 3, aliases=("candidate", "best"),
                   metrics=figures, card=card)  # fmt: skip
    recorder.state("finished", "all steps done")
    recorder.report()
    backlog = recorder.close(240)
    assert backlog.empty, str(backlog)
    return backlog.run_id


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ui")
    server = MlflowServer(folder / "server").start()
    runs = [record(folder, server.uri, number, lr) for number, lr in ((1, 0.01), (2, 0.02))]
    experiment = MlflowClient(server.uri).get_experiment_by_name(EXPERIMENT).experiment_id
    with Browser(folder / "profile") as browser:
        yield browser, f"{server.uri}/#", experiment, runs, folder / "screenshots"
    server.kill()


def test_run_list_leads_to_a_run_that_explains_itself(surroundings):
    browser, root, experiment, _, shots = surroundings
    browser.go(f"{root}/experiments/{experiment}/runs")
    shown = browser.wait("small-1", "small-2", "photos/train")
    assert EXPERIMENT in shown
    browser.screenshot(shots / "runs.png")
    browser.click("small-2")
    shown = browser.wait("Finished", "Does it learn?", "recipe", "git.commit", "manifest.sha256", REGISTERED)
    assert "photos/train (d1d2d3)" in shown
    assert "uid-2" in shown
    browser.screenshot(shots / "run.png")


def test_charts_show_the_curves(surroundings):
    browser, root, experiment, runs, shots = surroundings
    browser.go(f"{root}/experiments/{experiment}/runs/{runs[0]}/model-metrics")
    browser.wait("train\n(2)", "eval\n(1)", "loss", "knn_top1")
    browser.wait_for(".js-plotly-plot .scatterlayer path, .js-plotly-plot svg")
    browser.screenshot(shots / "charts.png")
    browser.click("System metrics")
    browser.wait("system/node0", "cpu_utilization_percentage")
    browser.screenshot(shots / "system.png")


def test_artifacts_show_picture_config_and_report(surroundings):
    browser, root, experiment, runs, shots = surroundings
    browser.go(f"{root}/experiments/{experiment}/runs/{runs[0]}/artifacts/figures/features-000200.png")
    browser.wait("config.yaml", "report.html", "figures/features-000200.png")
    browser.wait_for("img[src*='features-000200'], img[src^='blob:'], .image-outer-container img")
    browser.screenshot(shots / "artifacts.png")
    browser.go(f"{root}/experiments/{experiment}/runs/{runs[0]}/artifacts/config.yaml")
    browser.wait("lr: 0.01")
    browser.go(f"{root}/experiments/{experiment}/runs/{runs[0]}/artifacts/report.html")
    browser.wait_for("iframe")
    browser.screenshot(shots / "report.png")


def test_compare_shows_what_differs(surroundings):
    browser, root, experiment, runs, shots = surroundings
    wanted = f"runs=[%22{runs[0]}%22,%22{runs[1]}%22]&experiments=[%22{experiment}%22]"
    browser.go(f"{root}/compare-runs?{wanted}")
    browser.wait("Comparing 2 Runs", "small-1", "small-2", "train.lr", "0.01", "0.02", "eval/knn_top1")
    browser.screenshot(shots / "compare.png")


def test_registered_model_has_card_and_aliases(surroundings):
    browser, root, _, _, shots = surroundings
    browser.go(f"{root}/models/{REGISTERED}/versions/2")
    shown = browser.wait("Version 2", "best", "candidate", "Backbone of small-2", "eval/knn_top1", "small-2")
    assert "model.predict(images)" in shown
    browser.screenshot(shots / "model.png")
