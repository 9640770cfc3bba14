"""`jobs/detect.py` and `jobs/segment.py`: settings to data, model, training, records and weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from itpn_core.errors import ConfigError, UserError
from itpn_core.random import name_key
from orchestrator.config.load import to_yaml
from orchestrator.config.schema import flat_values, leaves
from orchestrator.data.store import StoreConfig
from orchestrator.dense.backbone import Opened, open_backbone
from orchestrator.dense.config import DetectConfig, SegmentConfig
from orchestrator.dense.train import DenseTask, train
from orchestrator.launch.show import table
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values

Config = DetectConfig | SegmentConfig
_NEEDS = ("torchvision", "pycocotools", "segmentation_models_pytorch", "torchmetrics")
_SIGNED = (1 << 63) - 1


@dataclass(frozen=True)
class Built:
    """A task that is ready to train.

    Attributes:
        task: model and data.
        opened: its backbone.
        classes: names of the classes, the background of a detector not counted.
        data: what is trained and evaluated on, for people.
    """

    task: DenseTask
    opened: Opened
    classes: tuple[str, ...]
    data: str


def detect(config: DetectConfig, store: StoreConfig | None = None) -> int:
    """Trains and evaluates a detector; returns the exit code."""
    return _run("detect", config, lambda: _detection(config, store))


def segment(config: SegmentConfig, store: StoreConfig | None = None) -> int:
    """Trains and evaluates a segmenter; returns the exit code."""
    return _run("segment", config, lambda: _segmentation(config, store))


def _detection(config: DetectConfig, store: StoreConfig | None) -> Built:
    from orchestrator.dense.coco import check_same_categories, read_coco
    from orchestrator.dense.detection import Detection

    _check_given(config.data, ("train_images", "train_annotations", "val_images", "val_annotations"))
    data = config.data
    how = {"masks": config.detector.kind == "mask_rcnn", "skip_empty": data.empty_boxes == "skip"}
    train_split = read_coco(data.train_images, data.train_annotations, **how)
    val_split = read_coco(data.val_images, data.val_annotations, **how)
    check_same_categories(train_split, val_split)
    opened = open_backbone(config.backbone, config.model, store)
    task = Detection(config, opened, train_split, val_split)
    names = tuple(name for _, name in train_split.categories)
    counts = [f"{len(s.image_ids)} images, {len(s.coco.anns)} objects" for s in (train_split, val_split)]
    return Built(task, opened, names, f"train {counts[0]}; val {counts[1]}; {len(names)} classes")


def _segmentation(config: SegmentConfig, store: StoreConfig | None) -> Built:
    from orchestrator.dense.masks import read_masks
    from orchestrator.dense.segmentation import Segmentation

    _check_given(config.data, ("train_images", "val_images", "classes"))
    data, count = config.data, len(config.data.classes)
    splits = [
        read_masks(data.train_images, data.train_masks, count),
        read_masks(data.val_images, data.val_masks, count),
    ]
    opened = open_backbone(config.backbone, config.model, store)
    task = Segmentation(config, opened, *splits)
    counts = [f"{name} {len(split.pairs)} images" for name, split in zip(("train", "val"), splits, strict=True)]
    return Built(task, opened, config.data.classes, f"{'; '.join(counts)}; {count} classes")


def _check_given(data: Any, names: tuple[str, ...]) -> None:
    missing = [f"data.{name}" for name in names if not getattr(data, name)]
    if missing:
        raise ConfigError(missing[0], "", "is needed", f"Set {', '.join(missing)}.")


def _run(job: str, config: Config, build: Callable[[], Built]) -> int:
    """Builds, trains, evaluates, records and saves.

    Raises:
        UserError: settings, data or weights cannot be used.
    """
    absent = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"{', '.join(absent)} not installed; run pip install 'itpn-orchestrator[dense]'.")
    torch.manual_seed(name_key(config.train.seed, 0, "dense-weights") & _SIGNED)
    built = build()
    directory = _new_directory(job, config)
    print(f"{built.opened.story}\ndata: {built.data}\nrun: {directory}")
    recorder = _open_recorder(job, config, directory, built)
    try:
        metrics = train(built.task, config.train, print, recorder.metrics)
        weights = save_weights(job, config, built, directory)
        recorder.artifact(weights, "weights")
        (directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        recorder.state("finished")
    except BaseException as error:
        recorder.state("killed" if isinstance(error, KeyboardInterrupt) else "failed", str(error)[:500])
        raise
    finally:
        backlog = recorder.close()
        if backlog.lost or (config.track.follow and not backlog.empty):
            print(f"warning: {backlog}")
    shown = [(name, f"{100 * value:.2f} %") for name, value in metrics.items() if not name.startswith("iou/")]
    print(table([("data", built.data), *shown, ("weights", str(weights)), ("tracking", config.track.uri)]))
    return 0


def _new_directory(job: str, config: Config) -> Path:
    """A folder of its own for every run: the settings' name, with a number when it was used before."""
    if "://" in config.run.storage:
        raise ConfigError("run.storage", config.run.storage, "must be a local folder for dense jobs", "Copy it later.")
    values = flat_values(config)
    counted = {leaf.key: values[leaf.key] for leaf in leaves(type(config)) if leaf.affects_result}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True, default=list).encode()).hexdigest()[:8]
    name = config.run.name or f"{job}-{digest}"
    for number in range(1, 10_000):
        directory = Path(config.run.storage, name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise ConfigError("run.name", name, "was used too often", "Give another name.")


def _open_recorder(job: str, config: Config, directory: Path, built: Built) -> Recorder:
    recorder = Recorder(
        config.track,
        uuid.uuid4().hex,
        directory,
        name=directory.name,
        secrets=secret_values(os.environ),
        follow=config.track.follow,
    )
    recorder.state("running")
    recorder.params(asdict(config))
    recorder.tags({"job": job, "data": built.data, "classes": len(built.classes)})
    recorder.text("config.yaml", to_yaml(config))
    recorder.text("weights.txt", built.opened.story)
    return recorder


def save_weights(job: str, config: Config, built: Built, directory: Path) -> Path:
    """All weights as safetensors; the metadata says what is needed to build the model again."""
    path = directory / "final" / f"{job}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: Mapping[str, Any] = {
        "model": asdict(built.opened.model.config),
        "pyramid_dim": built.opened.model.pyramid_dim,
        "head": asdict(config.detector if isinstance(config, DetectConfig) else config.head),
        "classes": built.classes,
        "mean": built.opened.mean,
        "std": built.opened.std,
        "step": config.train.steps,
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in built.task.model.state_dict().items()}
    save_file(tensors, path, metadata={"job": job, **{key: json.dumps(value) for key, value in facts.items()}})
    return path
