"""`jobs/evaluate.py`: one checkpoint under the given reduction settings, beside itself unreduced."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itpn_core.benchmark.timing import machine
from itpn_core.reduction.plan import make_plan
from orchestrator.checkpoint.source import Source
from orchestrator.config.errors import SettingError
from orchestrator.config.tree import EvaluateConfig
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest, Split
from orchestrator.data.preflight import open_dataset
from orchestrator.data.views import EvalView
from orchestrator.evaluate.choice import check_shape, find_checkpoint, open_checkpoint
from orchestrator.evaluate.features import collect
from orchestrator.evaluate.quality import Labelled, Protocol, answers, compare, probe_rates
from orchestrator.evaluate.report import Report, Row
from orchestrator.evaluate.subject import AGAIN, OFF, PLAIN, Cost, Setting, Subject
from orchestrator.launch.cli import EXIT_OK
from orchestrator.launch.place import local_directory
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import secret_values
from orchestrator.track.reduction_figure import draw_reduction
from orchestrator.train.precision import autocast_dtype

GIVEN = "given"
_CLOSE_S = 30.0


def evaluate(config: EvaluateConfig, recipe: str) -> int:
    """Measures, prints and writes; returns the exit code.

    Raises:
        UserError: the checkpoint, the data or a setting is wrong.
    """
    del recipe
    config = find_checkpoint(config)
    source = open_checkpoint(config)
    check_shape(config.model, source)
    manifest = open_dataset(config.data)
    check_counts(config, manifest)
    subject = open_subject(config, source)
    settings = _settings(config, subject)
    report = Report(
        _facts(config, source, manifest, subject),
        _rows(settings, _scores(config, manifest, subject, settings), _costs(config, manifest, subject, settings)),
    )
    _show(report)
    if config.evaluate.json:
        _write(config, source, manifest, subject, report)
    return EXIT_OK


def open_subject(config: EvaluateConfig, source: Source) -> Subject:
    """The checkpoint's backbone at the evaluated size, on the device that the settings name."""
    device = pick_device(config.cluster.device)
    dtype = autocast_dtype(config.train.precision, device)
    norm = config.objective.mean, config.objective.std
    return Subject(source.headless(), config.data.image_size, *norm, device, dtype)


def pick_device(name: str) -> torch.device:
    """The device of this process that a setting names.

    Raises:
        SettingError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingError("cluster.device='cuda', but this machine has no CUDA device: use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_counts(config: EvaluateConfig, manifest: Manifest) -> None:
    """Refuses more images than there are, and banks too small to vote or to train a probe.

    Raises:
        SettingError: which setting, and what is possible.
    """
    train, val = manifest.split(config.data.train_split), manifest.split(config.data.val_split)
    for key, asked, split in (("eval.bank", config.eval.bank, train), ("eval.queries", config.eval.queries, val)):
        if asked > split.samples:
            raise SettingError(
                f"{key}={asked} but the split {split.name!r} has {split.samples} samples: use at most that"
            )
    if config.eval.bank < max(config.eval.k, 20):
        raise SettingError(f"eval.bank={config.eval.bank}: it must be at least {max(config.eval.k, 20)} here")


def _settings(config: EvaluateConfig, subject: Subject) -> dict[str, Setting]:
    """The unreduced model, and what was asked for when that reduces anything; checked against model and grid."""
    given = (config.model.migration, config.model.gathering)
    subject.apply(given)
    reduced = subject.model.is_reduced
    subject.apply(OFF)
    _note_idle(given, subject)
    return {PLAIN: OFF, GIVEN: given} if reduced else {PLAIN: OFF}


def _note_idle(given: Setting, subject: Subject) -> None:
    """Says which drops drop nothing: on small grids rounding up to a multiple of 8 keeps every token."""
    migration, grid = given[0], subject.model.grid
    dropped = {drop.layer for drop in make_plan(*given, subject.model.config.depths[2], grid).drops}
    wanted = zip(migration.layers, migration.keep, strict=True)
    if idle := [str(layer) for layer, keep in wanted if keep < 1 and layer not in dropped]:
        print(
            f"note: of {grid[0]}x{grid[1]} tokens none is dropped before layer {', '.join(idle)}: what is kept is"
            " rounded up to a multiple of 8. A larger --size has more tokens"
        )


def _rows(settings: Mapping[str, Setting], scores: Mapping[str, Any], costs: Mapping[str, Cost]) -> dict[str, Row]:
    names = [*settings, *([AGAIN] if costs else [])]
    return {name: Row(settings.get(name, OFF), scores.get(name, {}), costs.get(name)) for name in names}


def _scores(
    config: EvaluateConfig, manifest: Manifest, subject: Subject, settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """Accuracy of every setting; each image is read once and shown to all of them."""
    asked = config.evaluate
    both = not (asked.knn or asked.linear)
    protocol = Protocol(asked.knn or both, asked.linear or both, config.eval.k, asked.rates, asked.seeds)

    def extract(images_u8_B3HW: Tensor) -> Tensor:
        parts = []
        for setting in settings.values():
            subject.apply(setting)
            parts.append(subject.features(images_u8_B3HW))
        subject.apply(OFF)
        return torch.cat(parts, dim=1)

    train, val = manifest.split(config.data.train_split), manifest.split(config.data.val_split)
    read = partial(_read, config, subject, extract)
    bank, bank_labels = read(train, config.eval.bank)
    queries, query_labels = read(val, config.eval.queries)
    width, device = bank.shape[1] // len(settings), subject.device
    found = {}
    for index, name in enumerate(settings):  # the unreduced model comes first
        part = slice(index * width, (index + 1) * width)
        data = Labelled(
            bank[:, part].to(device), bank_labels.to(device), queries[:, part].to(device), query_labels.to(device),
            len(train.classes),
        )  # fmt: skip
        if name == PLAIN:
            protocol = replace(protocol, chosen=probe_rates(data, protocol))
        found[name] = answers(data, protocol)
    return {name: compare(right, found[PLAIN]) for name, right in found.items()}


def _read(config: EvaluateConfig, subject: Subject, extract: Any, split: Split, count: int) -> tuple[Tensor, Tensor]:
    view = EvalView(subject.size, config.eval.crop, count)
    found = collect(extract, config.data, split, view, config.eval.batch, 0, 1, subject.device)
    if found.damaged:
        print(f"warning: {len(found.damaged)} damaged images of the split {split.name!r} are left out")
    return found.features, found.labels


def _costs(
    config: EvaluateConfig, manifest: Manifest, subject: Subject, settings: Mapping[str, Setting]
) -> dict[str, Cost]:
    asked = config.evaluate
    if not asked.rounds:
        return {}
    images = val_images(config, manifest, subject.size, asked.batch)
    return subject.costs({**settings, AGAIN: OFF}, images, rounds=asked.rounds, warmup=asked.warmup)


def val_images(config: EvaluateConfig, manifest: Manifest, size: int, count: int) -> Tensor:
    """uint8 [count, 3, size, size], images at equal distances over the val split (repeated where it is shorter)."""
    split = manifest.split(config.data.val_split)
    shown = min(count, split.samples)
    view = EvalView(size, config.eval.crop, shown)
    with open_loader(
        config.data, split, seed=0, epoch=0, first_batch=0, global_batch=shown, rank=0, world=1, view=view
    ) as batches:
        images: Tensor = next(batches).images
    return images[torch.arange(count) % shown]


def _facts(config: EvaluateConfig, source: Source, manifest: Manifest, subject: Subject) -> dict[str, Any]:
    trained, grid = source.model.img_size // source.model.patch_size, subject.model.grid
    resampled = f", positions resampled from {trained}x{trained}" if (trained, trained) != grid else ""
    queries = config.eval.queries or manifest.split(config.data.val_split).samples
    return {
        "checkpoint": source.place,
        "step": source.step,
        "model": f"{source.model.family}, width {source.model.embed_dim}, depths {source.model.depths}",
        "weight_bytes": subject.weight_bytes,
        "image_size": subject.size,
        "grid": f"{grid[0]}x{grid[1]}{resampled}",
        "data": config.data.source,
        "manifest": manifest.fingerprint,
        "accuracy": f"bank {config.eval.bank} train images, {queries} held-out images, crop {config.eval.crop:g},"
        f" k={config.eval.k}; differences on the same images with paired 95% intervals",
        "timing": f"{config.evaluate.rounds} interleaved rounds of {config.evaluate.batch} images after"
        f" {config.evaluate.warmup}; median [quartiles]; the unreduced model twice is the noise floor",
        "precision": config.train.precision,
        "machine": machine(subject.device),
    }


def _show(report: Report) -> None:
    for name, value in report.facts.items():
        print(f"{name:<13} {value}")
    print(f"\n{report.table()}")


def _write(config: EvaluateConfig, source: Source, manifest: Manifest, subject: Subject, report: Report) -> None:
    path = Path(config.evaluate.json).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    written = [path]
    if GIVEN in report.rows and config.eval.figure_images:
        images = val_images(config, manifest, subject.size, config.eval.figure_images)
        subject.apply(report.rows[GIVEN].setting)
        written.append(
            draw_reduction(subject.model, images.float() / 255, subject.normalise(images), path.with_suffix(".png"))
        )
        subject.apply(OFF)
    print("\n" + "\n".join(f"written: {item}" for item in written))
    _keep_with_run(config, source, written)


def _keep_with_run(config: EvaluateConfig, source: Source, files: list[Path]) -> None:
    """Adds the files to the MLflow run that is named, else to the one that made the weights."""
    if source.record is not None and source.folder is not None and not config.evaluate.mlflow_run:
        run_uid, attempt = source.record.run_uid, source.record.attempts
        directory = local_directory(source.folder, run_uid)
    elif config.evaluate.mlflow_run:
        run_uid, attempt = config.evaluate.mlflow_run, 1
        directory = files[0].parent / f"{files[0].stem}-track"
    else:
        return
    if not config.track.follow:
        return
    directory.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(
        config.track, run_uid, directory, attempt, role="evaluate", creates=False, run_id=config.evaluate.mlflow_run,
        secrets=secret_values(os.environ),
    )  # fmt: skip
    for file in files:
        recorder.artifact(file, "evaluations")
    backlog = recorder.close(min(config.track.close_timeout_s, _CLOSE_S))
    print(f"MLflow run {backlog.run_id}: artifacts in evaluations/" if backlog.empty else f"warning: {backlog}")
