"""A fine-tuning under the engine: starts from weights, resumes bit for bit, leaves weights and a report."""

import json

import pytest
import torch
from safetensors.torch import load_file

from itpn_core.errors import UserError, WeightsError
from itpn_core.models import Backbone, ModelConfig
from orchestrator.checkpoint.source import open_source
from orchestrator.data.store import StoreConfig
from orchestrator.launch.check import check
from orchestrator.train.engine import Engine
from orchestrator.train.loop import train
from tests.support import LocalRun, tiny_classifier, tiny_config, write_shards


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """A finished pre-training run."""
    storage = tmp_path_factory.mktemp("pretrained")
    config = tiny_config(data, storage, "train.epochs=1", "train.optimizer.average_decay=0.5")
    train(config, LocalRun(config))
    return storage / "tiny"


def losses(run):
    found = {}
    for path in sorted((run.directory / "track" / "journal").rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "metrics" and "train/loss" in record["values"]:
                assert (
                    found.setdefault(record["step"], record["values"]["train/loss"]) == record["values"]["train/loss"]
                )
    return found


WORDS = (
    "checkpoint.every_steps=1",
    "train.log_every=1",
    "train.optimizer.average_decay=0.9",
    "model.drop_path_rate=0.2",
)


@pytest.fixture(scope="module")
def whole(data, pretrained, tmp_path_factory):
    config = tiny_classifier(data, tmp_path_factory.mktemp("whole"), *WORDS, f"init.checkpoint={pretrained}")
    run = LocalRun(config)
    return config, run, train(config, run)


@pytest.mark.parametrize("kill_at", [1, 5])
def test_killed_fine_tuning_resumes_to_the_same_losses_and_weights(
    data, pretrained, whole, tmp_path, monkeypatch, kill_at
):
    config = tiny_classifier(data, tmp_path, *WORDS, f"init.checkpoint={pretrained}")
    real = Engine.step

    def step(self, batch):
        if self.state.step == kill_at:
            raise Killed
        real(self, batch)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(Killed):
        train(config, LocalRun(config))
    monkeypatch.setattr(Engine, "step", real)
    second = LocalRun(config, attempt=2)
    assert train(config, second).step == whole[2].step
    assert losses(second) == losses(whole[1])
    name = "final/classifier.safetensors"
    expected, found = load_file(whole[1].directory / name), load_file(second.directory / name)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_start_reports_every_tensor_and_takes_the_backbone(data, pretrained, whole):
    notes = "\n".join(whole[1].notes)
    assert "backbone.safetensors" in notes
    assert "norm.weight, norm.bias" in notes  # renamed to the classifier's norm
    assert "head.weight" in notes
    config = whole[0]
    with Engine(config, LocalRun(config)) as engine:
        engine.kind.start(engine.state.task)
        engine.state.average.restart()
        backbone = load_file(pretrained / "final" / "backbone.safetensors")
        weights = engine.state.task.student.state_dict()
        assert torch.equal(weights["blocks.0.mlp.fc1.weight"], backbone["blocks.0.mlp.fc1.weight"])
        assert torch.equal(weights["fc_norm.weight"], backbone["norm.weight"])
        name = "student.blocks.0.mlp.fc1.weight"
        assert torch.equal(engine.state.average.tensors[name], backbone["blocks.0.mlp.fc1.weight"])


def test_outcome_and_files_of_a_run(whole):
    config, run, outcome = whole
    assert set(outcome.scores) == {"top-1 before training", "top-1", "top-5"}
    assert outcome.scores["top-5"][0] == 1.0  # four classes
    assert {path.suffix for path in (run.directory / "classes").iterdir()} == {".csv", ".md"}
    assert sorted(path.name for path in (run.directory / "figures").iterdir()) == [
        "confusion-00000000.png", "confusion-00000008.png",
    ]  # fmt: skip
    assert run.reports[-1]["eval/top1"] == outcome.scores["top-1"][0]
    source = open_source(str(run.directory), StoreConfig())
    assert source.model == config.model
    features = source.headless()(torch.rand(2, 3, 16, 16))
    assert features.shape == (2, 32)


def test_classes_are_learned(data, tmp_path):
    words = (
        "train.max_steps=80",
        "train.epochs=100",
        "train.optimizer.lr=3e-3",
        "finetune.mixup=0",
        "finetune.cutmix=0",
    )
    config = tiny_classifier(data, tmp_path, *words, "train.optimizer.layer_decay=1", "checkpoint.every_epochs=0",
                             "data.augment.rand_ops=0", "data.augment.erase=0")  # fmt: skip
    scores = train(config, LocalRun(config)).scores
    assert scores["top-1"][0] >= 0.9
    assert scores["top-1 before training"][0] <= 0.6


def test_other_sizes_and_token_reduction_train(data, pretrained, tmp_path):
    words = ("model.img_size=32", "model.migration.layers=[1]", "model.migration.keep=[0.5]", "train.epochs=1")
    config = tiny_classifier(data, tmp_path, *words, f"init.checkpoint={pretrained}")
    run = LocalRun(config)
    assert train(config, run).step == 4
    assert "resampled: pos_embed (2x2 to 4x4)" in "\n".join(run.notes)


def test_check_refuses_other_weights_in_words(data, pretrained, tmp_path):
    inputs = check(tiny_classifier(data, tmp_path, f"init.checkpoint={pretrained}")).inputs
    assert len(inputs["init.weights"]) == 64
    assert check(tiny_classifier(data, tmp_path)).inputs == {"init.weights": "none"}
    with pytest.raises(UserError, match=r"model\.embed_dim=32 model\.depths=\[1,1,2\]"):
        check(tiny_classifier(data, tmp_path, f"init.checkpoint={pretrained}", "model.embed_dim=64"))
    with pytest.raises(WeightsError, match="no such file"):
        check(tiny_classifier(data, tmp_path, f"init.checkpoint={tmp_path}/none"))
    with pytest.raises(UserError, match="keep_head"):
        check(tiny_classifier(data, tmp_path, "init.keep_head=true"))
    with pytest.raises(UserError, match="registered"):
        check(tiny_classifier(data, tmp_path, "track.registered_model=x"))


def test_a_head_is_kept_only_when_asked(data, whole, tmp_path):
    trained = whole[1].directory
    head = load_file(trained / "final" / "classifier.safetensors")["head.weight"]
    for keep in (False, True):
        words = (f"init.checkpoint={trained}", f"init.keep_head={keep}", f"run.name=keep-{keep}")
        config = tiny_classifier(data, tmp_path, *words)
        with Engine(config, LocalRun(config)) as engine:
            engine.kind.start(engine.state.task)
            assert torch.equal(engine.state.task.student.head.weight, head) is keep


def test_published_classifier_file_is_taken(data, tmp_path):
    torch.manual_seed(1)
    published = Backbone(
        ModelConfig(embed_dim=32, num_heads=2, depths=(1, 1, 2), patch_size=8, img_size=16), num_classes=9,
        final_norm="pooled",
    )  # fmt: skip
    path = tmp_path / "published.pth"
    torch.save({"model": published.state_dict()}, path)
    words = (f"init.checkpoint={path}", "init.keep_head=true")
    config = tiny_classifier(data, tmp_path, *words, "model.num_heads=2")
    with Engine(config, LocalRun(config)) as engine:
        engine.kind.start(engine.state.task)
        student = engine.state.task.student
        assert torch.equal(student.blocks[0].mlp.fc1.weight, published.blocks[0].mlp.fc1.weight)
        assert student.head.weight.shape == (4, 32)
