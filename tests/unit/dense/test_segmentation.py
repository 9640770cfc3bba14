"""Segmentation: mask errors are clear, and a training with evaluation runs on images of several sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from itpn_core.errors import ConfigError
from itpn_core.models import ModelConfig
from itpn_core.reduction.config import TokenGathering, TokenMigration
from orchestrator.config.load import load
from orchestrator.dense.config import IGNORED, BackboneConfig, DenseTrainConfig, SegmentConfig
from orchestrator.dense.masks import read_masks
from orchestrator.dense.problems import DenseDataError
from tests.unit.dense.scenes import SIZES, TINY

segmentation = pytest.importorskip("orchestrator.dense.segmentation")

from orchestrator.dense.backbone import open_backbone  # noqa: E402
from orchestrator.dense.job import segment  # noqa: E402
from orchestrator.dense.train import batches, draws, epoch_order, train  # noqa: E402

NAMES = "data.classes=[background,green thing,blue]"


def configured(masks, tmp_path, *words):
    places = [
        f"data.{split}_{part}={folder}"
        for split in ("train", "val")
        for part, folder in zip(("images", "masks"), masks, strict=True)
    ]
    run = [f"run.storage={tmp_path}/runs", f"track.uri=sqlite:///{tmp_path}/mlflow.db", "run.name=tiny"]
    return load(SegmentConfig, None, [*TINY, "head.channels=32", NAMES, *places, *run, *words])


def task_of(config):
    data = config.data
    split = read_masks(data.train_images, data.train_masks, len(data.classes))
    torch.manual_seed(0)
    return segmentation.Segmentation(config, open_backbone(config.backbone, config.model), split, split)


def repaint(masks, name, pixels):
    Image.fromarray(pixels).save(masks[1] / name)


@pytest.mark.parametrize(("change", "words"), [
    (lambda m: (m[1] / "2.png").unlink(), "2.png: has no mask 2.png"),
    (lambda m: repaint(m, "1.png", np.zeros((5, 6), np.uint8)), "1.png: is 6 x 5, its image is 72 x 56"),
    (lambda m: repaint(m, "0.png", np.full((64, 48), 3, np.uint8)), "0.png: holds class 3; data.classes names 3"),
    (lambda m: repaint(m, "0.png", np.zeros((64, 48, 3), np.uint8)), "0.png: is a RGB image; a mask holds one"),
    (lambda m: (m[1] / "0.png").write_bytes(b"?"), "0.png or its mask: not a readable image"),
])  # fmt: skip
def test_what_is_wrong_with_masks_is_said(masks, change, words):
    change(masks)
    with pytest.raises(DenseDataError, match=words):
        read_masks(str(masks[0]), str(masks[1]), 3)


def test_missing_folders_and_folders_without_images_are_named(masks, tmp_path):
    with pytest.raises(DenseDataError, match="'/nowhere': no such folder"):
        read_masks("/nowhere", str(masks[1]), 3)
    with pytest.raises(DenseDataError, match="holds no image other than PNG"):
        read_masks(str(masks[1]), "", 3)


@pytest.mark.parametrize("words", [
    ("head.kind=upernet", "data.crop=48", "data.scale=[0.8,1.2]"),
    ("head.kind=fpn", "data.crop=0", "backbone.migration.layers=[1]", "backbone.migration.keep=[0.5]"),
])  # fmt: skip
def test_trains_and_evaluates_on_images_of_several_sizes(masks, tmp_path, words):
    assert segment(configured(masks, tmp_path, "train.steps=2", "train.eval_every=1", *words)) == 0
    run = tmp_path / "runs" / "tiny"
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0.0 <= metrics["miou"] <= 1.0
    assert {"iou/background", "iou/green_thing", "iou/blue", "pixel_accuracy"} <= metrics.keys()
    assert (run / "final" / "segment.safetensors").stat().st_size > 10_000


def test_it_learns_and_repeats_itself(masks, tmp_path):
    config = configured(
        masks, tmp_path, "train.steps=25", "data.crop=0", "train.optimizer.lr=3e-3", "train.log_every=25"
    )

    def outcome():
        seen = []
        metrics = train(task_of(config), config.train, lambda _: None, lambda step, values: seen.append(values))
        return metrics, seen[0]["train/loss"]

    first, loss = outcome()
    assert first["miou"] > 0.5
    assert outcome() == (first, loss)


def test_evaluation_counts_right_pixels_and_leaves_ignored_ones_out(masks, tmp_path):
    config = configured(masks, tmp_path)
    task = task_of(config)

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.place = 0

        def forward(self, images):
            truth = task._val.mask(self.place)
            self.place += 1
            truth = torch.where(truth == IGNORED, 2, truth)
            return torch.nn.functional.one_hot(truth, 3).movedim(-1, 0)[None].float()

    task.model = Oracle()
    assert task.evaluate(torch.device("cpu"))["miou"] == 1.0


def test_samples_of_other_sizes_are_padded_with_ignored_pixels():
    small, large = (torch.ones(3, 4, 6), torch.ones(4, 6).long()), (torch.ones(3, 5, 2), torch.ones(5, 2).long())
    images, masks = segmentation.collate([small, large])
    assert images.shape == (2, 3, 5, 6)
    assert masks[0, 4].tolist() == [IGNORED] * 6
    assert masks[1, :, 2:].eq(IGNORED).all()
    assert images[1, :, :, 2:].eq(0).all()


def test_scores_have_the_size_of_any_image(masks, tmp_path):
    model = task_of(configured(masks, tmp_path)).model.eval()
    for width, height in SIZES:
        assert model(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


def test_order_and_draws_depend_on_their_arguments_alone(masks, tmp_path):
    assert sorted(epoch_order(1, 0, 7)) == list(range(7))
    assert epoch_order(1, 0, 50).tolist() != epoch_order(1, 1, 50).tolist()
    assert draws(1, 2, 3, "crop", 4) == draws(1, 2, 3, "crop", 4) != draws(1, 2, 4, "crop", 4)
    config = configured(masks, tmp_path, "train.steps=5", "train.batch=3", "data.crop=32")
    task = task_of(config)
    one, other = list(batches(task, config.train)), list(batches(task, config.train))
    assert len(one) == 5
    assert all(torch.equal(a[0], b[0]) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    seen = [image.sum().item() for batch in one for image, _ in batch]
    assert len(seen) == 15


def test_a_checkpoint_brings_its_pyramid_unless_a_new_one_is_asked_for(tmp_path):
    from tests.unit.export.test_export import write_run

    student = write_run(tmp_path / "run")
    model = None
    for pyramid in ("auto", "new"):
        opened = open_backbone(BackboneConfig(checkpoint=str(tmp_path / "run"), pyramid=pyramid), model)
        assert opened.mean == (0.5, 0.4, 0.3)
        assert torch.equal(opened.model.pos_embed, student.pos_embed + 1)
        kept = torch.equal(opened.model.align_dim_16tofpn.weight, student.align_dim_16tofpn.weight + 1)
        assert kept == (pyramid == "auto")
        assert ("the checkpoint's" in opened.story) == kept


def test_token_reduction_is_the_models_own_unless_another_or_none_is_asked_for():
    model = ModelConfig(
        embed_dim=32, num_heads=2, depths=(1, 1, 2), img_size=64, migration=TokenMigration(layers=(1,), keep=(0.5,))
    )
    own = open_backbone(BackboneConfig(pyramid_dim=16), model).model
    assert own.migration == model.migration
    windows = TokenGathering(window=2, tokens=1)
    both = open_backbone(BackboneConfig(pyramid_dim=16, gathering=windows), model).model
    assert (both.migration, both.gathering) == (model.migration, windows)
    assert not open_backbone(BackboneConfig(pyramid_dim=16, plain=True), model).model.is_reduced
    with pytest.raises(ConfigError, match="plain"):
        BackboneConfig(plain=True, gathering=windows)


def test_a_gradient_that_is_not_finite_stops_with_advice(masks, tmp_path):
    config = configured(masks, tmp_path, "train.steps=2")
    task = task_of(config)
    torch.nn.init.constant_(task.model.classifier[0].weight, float("nan"))
    with pytest.raises(ValueError, match=r"not finite at step 1 .*Lower train.optimizer.lr"):
        train(task, config.train, lambda _: None, lambda *_: None)


@pytest.mark.parametrize("words", [["train.batch=1"], ["data.classes=[one]"], ["data.scale=[2,1]"], ["train.steps=0"]])
def test_settings_that_cannot_be_trained_are_refused(words):
    with pytest.raises(ValueError, match=words[0].split("=")[0]):
        load(SegmentConfig, None, words)


def test_a_device_that_is_not_there_is_told():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from orchestrator.dense.train import pick_device

    with pytest.raises(ValueError, match="no GPU"):
        pick_device("cuda")
    assert DenseTrainConfig().batch == 8
    with pytest.raises(ConfigError):
        DenseTrainConfig(batch=0)
