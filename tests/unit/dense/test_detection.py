"""Detection: COCO-format errors are clear, and a training with evaluation runs on images of several sizes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from orchestrator.config.load import load
from orchestrator.dense.config import DetectConfig
from orchestrator.dense.problems import DenseDataError
from orchestrator.track.history import load_history
from tests.unit.dense.scenes import TINY

coco_room = pytest.importorskip("orchestrator.dense.coco")
detection = pytest.importorskip("orchestrator.dense.detection")

from orchestrator.dense.job import detect  # noqa: E402

SMALL = [
    *TINY, "detector.min_size=[64,80]", "detector.max_size=96", "detector.box_batch=16", "detector.detections=5",
    "detector.score_threshold=0.0", "detector.anchor_scale=4",
]  # fmt: skip


def configured(coco, tmp_path, *words):
    folder, path, _ = coco
    places = [f"data.{split}_images={folder}" for split in ("train", "val")]
    places += [f"data.{split}_annotations={path}" for split in ("train", "val")]
    run = [f"run.storage={tmp_path}/runs", f"track.uri=sqlite:///{tmp_path}/mlflow.db", "run.name=tiny"]
    return load(DetectConfig, None, [*SMALL, *places, *run, *words])


def broken(coco, change):
    """The annotation file after `change(content)`."""
    _, path, content = coco
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c["annotations"][0].update(bbox=[3, 4, 0, 5]), r"annotation 1: bbox \[3, 4, 0, 5\] is empty"),
    (lambda c: c["annotations"][0].update(bbox=[3, 4, 5]), r"annotation 1: bbox \[3, 4, 5\] is not \[x, y, width"),
    (lambda c: c["annotations"][0].update(bbox=[60, 4, 30, 5]), "leaves its image of 48 x 64"),
    (lambda c: c["annotations"][0].update(bbox=[48, 4, 1, 5]), "leaves its image of 48 x 64"),
    (lambda c: c["annotations"][1].update(category_id=99), "annotation 2: category_id 99 is unknown; .*: 3, 7"),
    (lambda c: c["annotations"][0].update(image_id=5), "annotation 1: image_id 5 is not among the images"),
    (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 1: has no segmentation; .*faster_rcnn"),
    (lambda c: c["images"][2].update(file_name="gone.jpg"), r"image 12 \(gone.jpg\): no such file"),
    (lambda c: c["images"][1].update(width=57), "is 72 x 56 pixels, the annotations say 57 x 56"),
    (lambda c: c["images"][1].pop("height"), r"images\[1\] lacks height"),
    (lambda c: c["images"][1].update(id=10), r"images\[1\] repeats id 10"),
    (lambda c: c.pop("categories"), "not COCO's format; expected lists images, annotations, categories"),
    (lambda c: c.update(categories=[]), "its list of categories is empty"),
])  # fmt: skip
def test_what_is_wrong_with_annotations_is_said(coco, change, words):
    broken(coco, change)
    with pytest.raises(DenseDataError, match=words):
        coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)


def test_missing_and_damaged_files_are_named(coco, tmp_path):
    folder, path, _ = coco
    with pytest.raises(DenseDataError, match=r"'/nowhere/a.json': no such file"):
        coco_room.read_coco(str(folder), "/nowhere/a.json", masks=True)
    with pytest.raises(DenseDataError, match="'/nowhere': no such folder"):
        coco_room.read_coco("/nowhere", str(path), masks=True)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DenseDataError, match=r"annotations.json: not readable as JSON .*Fetch or export it again"):
        coco_room.read_coco(str(folder), str(path), masks=True)


def test_an_unreadable_image_is_named(coco):
    (coco[0] / "3.png").write_bytes(b"not an image")
    with pytest.raises(DenseDataError, match=r"image 13 \(3.png\): not a readable image"):
        coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)


def test_many_problems_are_counted_and_the_first_listed(coco):
    broken(coco, lambda c: [a.update(bbox=[0, 0, 0, 0]) for a in c["annotations"] * 1])
    with pytest.raises(DenseDataError, match=r"6 problems:\n(.*\n){5}  \.\.\. and 1 more"):
        coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)


def test_empty_boxes_are_left_out_when_asked_and_optional_fields_are_filled(coco, capsys):
    def change(content):
        content["annotations"][0]["bbox"][3] = 0
        for record in content["annotations"]:
            del record["area"], record["iscrowd"]

    broken(coco, change)
    split = coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True, skip_empty=True)
    assert "1 empty boxes are left out" in capsys.readouterr().out
    assert len(split.coco.anns) == 5
    assert split.target(0, masks=True)["boxes"].shape == (0, 4)
    assert split.target(0, masks=True)["masks"].shape == (0, 64, 48)
    assert detection.average_precision(split.coco, [], "bbox")["ap"] == 0.0
    record = split.coco.anns[2]
    assert record["area"] == record["bbox"][2] * record["bbox"][3]


def test_splits_with_other_categories_are_refused(coco):
    one = coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)
    broken(coco, lambda c: c["categories"][1].update(name="red"))
    with pytest.raises(DenseDataError, match="7 'blue', 7 'red' stand in only one"):
        coco_room.check_same_categories(one, coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True))


def test_targets_are_corners_contiguous_labels_and_masks(coco):
    split = coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)
    x, y, w, h = coco[2]["annotations"][2]["bbox"]
    target = split.target(1, masks=True)
    assert target["boxes"][1].tolist() == [x, y, x + w, y + h]
    assert target["labels"].tolist() == [1, 2]
    assert target["masks"].shape == (2, 56, 72)
    assert abs(int(target["masks"][1].sum()) - w * h) <= w + h
    image, flipped = detection.mirrored(split.image(1), target)
    assert flipped["boxes"][1].tolist() == [72 - x - w, y, 72 - x, y + h]
    assert torch.equal(image.flip(-1), split.image(1))
    assert torch.equal(flipped["masks"].flip(-1), target["masks"])


def test_perfect_detections_have_precision_one_and_none_have_zero(coco):
    split = coco_room.read_coco(str(coco[0]), str(coco[1]), masks=True)
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9,
         "segmentation": split.coco.annToRLE(a)}
        for a in coco[2]["annotations"]
    ]  # fmt: skip
    for kind in ("bbox", "segm"):
        assert detection.average_precision(split.coco, found, kind)["ap"] == pytest.approx(1.0)
    assert detection.average_precision(split.coco, found[:1], "bbox")["ap"] < 0.5
    assert detection.average_precision(split.coco, [], "bbox")["ap"] == 0.0


@pytest.mark.parametrize("words", [
    (),
    ("detector.kind=faster_rcnn", "backbone.gathering.window=2", "backbone.gathering.tokens=2",
     "train.optimizer.layer_decay=0.8"),
])  # fmt: skip
def test_trains_and_evaluates_on_images_of_several_sizes(coco, tmp_path, capsys, words):
    assert detect(configured(coco, tmp_path, "train.steps=2", *words)) == 0
    run = tmp_path / "runs" / "tiny"
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0.0 <= metrics["box_ap"] <= 1.0
    assert ("mask_ap" in metrics) == (not words)
    with safe_open(run / "final" / "detect.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["green", "blue"]
        assert "backbone.backbone.patch_embed.proj.weight" in file.keys()  # noqa: SIM118 - not a dict
    history = load_history(run)
    assert sorted(history.series["train/loss_rpn_box_reg"]) == [1, 2]
    assert history.series["eval/box_ap"] == {2: metrics["box_ap"]}
    said = capsys.readouterr().out
    assert "step 2/2" in said
    assert "box_ap" in said
    assert detect(configured(coco, tmp_path, "train.steps=1", *words)) == 0
    assert (tmp_path / "runs" / "tiny-2" / "metrics.json").exists()


def test_settings_that_are_missing_are_listed(tmp_path):
    config = load(DetectConfig, None, [*SMALL, f"run.storage={tmp_path}"])
    with pytest.raises(ValueError, match=r"Set data\.train_images, data\.train_annotations"):
        detect(config)
