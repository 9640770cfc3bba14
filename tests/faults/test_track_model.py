"""A registered model loads where neither Ray nor our packages are, and gives the backbone's own features."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from itpn_core.models import ModelConfig, build_backbone
from orchestrator.track.config import TrackConfig, resolve
from orchestrator.track.recorder import Recorder

pytestmark = pytest.mark.long
CONFIG = ModelConfig(embed_dim=64, depths=(1, 1, 2), patch_size=16, img_size=32)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

LOADER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "orchestrator", "jobs", "omegaconf"}:
            raise ImportError(name + " is not on this machine")
sys.meta_path.insert(0, Blocker())
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_registry_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
import itpn_core
assert "code" in itpn_core.__file__, itpn_core.__file__
np.save(sys.argv[4], model.predict(np.load(sys.argv[3])))
"""


def test_registered_model_gives_the_backbones_features_without_ray(tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone(CONFIG).eval()
    run = tmp_path / "run"
    weights = run / "final" / "backbone.safetensors"
    weights.parent.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in backbone.state_dict().items()}, weights)
    config = resolve(TrackConfig(registered_model="itpn-test", poll_s=0.05), tmp_path)
    worse = weights.with_name("worse.safetensors")
    save_file({name: value + 0.01 for name, value in backbone.state_dict().items()}, worse)
    tellings = ((weights, 0.5), (weights, 0.5), (worse, 0.4))  # the same weights told twice stay one version
    for attempt, (file, score) in enumerate(tellings, start=1):
        recorder = Recorder(config, "uid", run, attempt)
        recorder.model(
            file, dataclasses.asdict(CONFIG), step=7, mean=MEAN, std=STD,
            metrics={"eval/knn_top1": score}, card="# Card\nPre-trained for a test.",
        )  # fmt: skip
        backlog = recorder.close(60)
        assert backlog.empty, str(backlog)

    client = MlflowClient(config.uri)
    newer, version = client.search_model_versions("name='itpn-test'")
    assert (version.tags["eval.knn_top1"], newer.tags["eval.knn_top1"]) == ("0.5", "0.4")
    assert "Pre-trained for a test" in version.description
    assert client.get_model_version_by_alias("itpn-test", "candidate").version == newer.version
    assert client.get_model_version_by_alias("itpn-test", "best").version == version.version

    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", LOADER, config.uri, "models:/itpn-test@best", "images.npy", "features.npy"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        normal = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        expected = backbone.forward_features(normal).mean(1).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, atol=1e-5)
