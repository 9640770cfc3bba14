"""Checks before anything is started: settings that cannot work together, and data that is not there."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from itpn_core.models.backbone import Backbone
from itpn_core.models.config import ModelConfig
from itpn_core.models.importer import plan_load
from itpn_core.pretraining.config import check_objective
from itpn_core.pretraining.tasks import FAMILY_OF, TAUGHT
from orchestrator.checkpoint.source import Source, open_source
from orchestrator.config.errors import SettingError
from orchestrator.config.tree import FinetuneConfig, JobConfig, PretrainConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.preflight import open_dataset
from orchestrator.launch.say import say
from orchestrator.track.config import why_away
from orchestrator.track.server import check_answers
from orchestrator.train.config import OptimizerConfig

_AS_YAML = str.maketrans("()", "[]")


class Checked(NamedTuple):
    """What the checks found.

    Attributes:
        manifest: of the data set.
        inputs: what decides the result besides settings and data, by name.
    """

    manifest: Manifest
    inputs: dict[str, str]


def check(config: JobConfig) -> Checked:
    """Refuses what could only fail later.

    Raises:
        UserError: one clear message for the first thing that is wrong.
    """
    _check_settings(config)
    if config.track.required:
        check_answers(config.track)
    elif away := why_away(config.track):
        say(
            f"warning: MLflow cannot be reached ({away}); the run goes on and keeps its records, which are shipped when"
            " it answers or by jobs/sync_runs.py (track.required=true makes this an error)",
            error=True,
        )
    manifest = open_dataset(config.data)
    train, val = manifest.split(config.data.train_split), manifest.split(config.data.val_split)
    batch = config.train.global_batch
    if config.data.last_batch == "drop" and train.samples < batch:
        raise SettingError(
            f"train.global_batch={batch} is larger than the split {train.name!r} with {train.samples} samples, so an"
            f" epoch would have no batch: use at most {train.samples}, or data.last_batch=short"
        )
    if isinstance(config, FinetuneConfig):
        _check_classes(config, manifest)
        wanted = [("eval.images", config.eval.images, val)]
    else:
        wanted = [("eval.bank", config.eval.bank, train), ("eval.queries", config.eval.queries, val)]
    for key, asked, split in wanted:
        if asked > split.samples:
            raise SettingError(
                f"{key}={asked} but the split {split.name!r} has {split.samples} samples: use at most that"
            )
    return Checked(manifest, _starting_weights(config) if isinstance(config, FinetuneConfig) else {})


def _check_classes(config: FinetuneConfig, manifest: Manifest) -> None:
    if len(manifest.classes) < 2:
        raise SettingError(
            f"data.source={config.data.source} has {len(manifest.classes)} class names: a classifier needs at least 2."
            " Make the shards from class folders, or give jobs/index_shards.py --classes FILE"
        )


def _starting_weights(config: FinetuneConfig) -> dict[str, str]:
    """Opens the starting weights and tries them on a model without memory; their digest counts in the run's name.

    Raises:
        UserError: they are not there, cannot be read, or belong to another model.
    """
    if not config.init.checkpoint:
        return {"init.weights": "none"}
    source = open_source(config.init.checkpoint, config.data.store)
    _check_shape(config.model, source)
    plan_load(Backbone(config.model, final_norm="pooled", device="meta"), source.state, source.place)
    return {"init.weights": digest(source.state)}


def _check_shape(asked: ModelConfig, source: Source) -> None:
    found = source.model
    names = ("family", "embed_dim", "depths", "num_heads", "patch_size", "in_chans")
    # 0 heads stand for the width's default; the flavours of the first paper have one backbone
    same = asked.is_fast == found.is_fast and asked.heads == found.heads
    if same and all(getattr(asked, n) == getattr(found, n) for n in names if n not in ("family", "num_heads")):
        return
    shape = " ".join(f"model.{name}={getattr(found, name)}".replace(" ", "") for name in names).translate(_AS_YAML)
    raise SettingError(
        f"init.checkpoint={source.place} holds another model than these settings describe. Its own shape is: {shape}"
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors: equal for equal weights, wherever and however they lie."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_settings(config: JobConfig) -> None:
    workers, batch = config.cluster.workers, config.train.global_batch
    at_least_one = {
        "cluster.workers": workers,
        "train.epochs": config.train.epochs,
        "train.log_every": config.train.log_every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.batch": config.eval.batch,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise SettingError(f"{key}={value}: it must be at least 1")
    if not 0 <= config.cluster.workers_min <= workers:
        raise SettingError(
            f"cluster.workers_min={config.cluster.workers_min}: allowed are 0 (always cluster.workers) to"
            f" cluster.workers={workers}"
        )
    if config.cluster.max_failures < 0:
        raise SettingError(
            f"cluster.max_failures={config.cluster.max_failures}: it must be at least 0; for a run that should survive"
            " many failures give a large number, such as 1000"
        )
    if config.eval.wait_s < 0:
        raise SettingError(f"eval.wait_s={config.eval.wait_s:g}: it must be at least 0 seconds")
    for key, seconds in {"run.lease_s": config.run.lease_s, "cluster.resize_s": config.cluster.resize_s}.items():
        if seconds < 1:
            raise SettingError(f"{key}={seconds:g}: it must be at least 1 second")
    if batch < workers:
        raise SettingError(
            f"train.global_batch={batch} is smaller than cluster.workers={workers}: every worker needs at least one"
            f" image per step; use train.global_batch>={workers} or cluster.workers<={max(batch, 1)}"
        )
    if config.data.image_size != config.model.img_size:
        raise SettingError(
            f"data.image_size={config.data.image_size} differs from model.img_size={config.model.img_size}:"
            " leave data.image_size at 0 to follow the model"
        )
    optimizer = config.train.optimizer
    if optimizer.lr <= 0:
        raise SettingError(f"train.optimizer.lr={optimizer.lr}: it must be above 0")
    for key in ("warmup_fraction", "min_lr_ratio", "average_decay"):
        value = getattr(optimizer, key)
        if not 0 <= value < 1:
            raise SettingError(f"train.optimizer.{key}={value}: it must be in [0, 1)")
    _check_warmup(optimizer)
    sigma = config.train.guard.loss_sigma
    if not 0 <= sigma < math.inf:
        raise SettingError(f"train.guard.loss_sigma={sigma}: it must be 0 (never) or a number of deviations, such as 6")
    if not 0 < optimizer.layer_decay <= 1:
        raise SettingError(f"train.optimizer.layer_decay={optimizer.layer_decay}: it must be in (0, 1]")
    if config.train.teacher_stream and (isinstance(config, FinetuneConfig) or config.objective.kind not in TAUGHT):
        raise SettingError("train.teacher_stream=true: only objective.kind=fast and clip have a frozen teacher")
    if isinstance(config, FinetuneConfig):
        _check_finetuning(config)
    else:
        _check_pretraining(config)


def _check_warmup(optimizer: OptimizerConfig) -> None:
    for key in ("warmup_epochs", "warmup_steps"):
        value = getattr(optimizer, key)
        if value < 0 or not math.isfinite(value):
            raise SettingError(f"train.optimizer.{key}={value}: it must be 0 or more")
    if optimizer.warmup_epochs and optimizer.warmup_steps:
        raise SettingError(
            f"train.optimizer.warmup_epochs={optimizer.warmup_epochs:g} and warmup_steps={optimizer.warmup_steps} both"
            " say how long the warm-up is: leave one of them at 0"
        )


def _check_finetuning(config: FinetuneConfig) -> None:
    if config.track.registered_model:
        raise SettingError(
            f"track.registered_model={config.track.registered_model!r}: fine-tuned classifiers are not registered;"
            " leave it empty (the weights are an artifact of the run)"
        )
    if config.init.keep_head and not config.init.checkpoint:
        raise SettingError("init.keep_head=true without init.checkpoint: there is no head to keep")


def _check_pretraining(config: PretrainConfig) -> None:
    family = FAMILY_OF.get(config.objective.kind)
    if family and config.model.family != family:
        raise SettingError(
            f"model.family={config.model.family!r} does not go with objective.kind={config.objective.kind!r}:"
            f" set model.family={family}"
        )
    check_objective(config.objective)
    if config.eval.bank < config.eval.k:
        raise SettingError(
            f"eval.bank={config.eval.bank} is smaller than eval.k={config.eval.k}: neighbours would be missing"
        )
    if config.eval.k < 1:
        raise SettingError(f"eval.k={config.eval.k}: it must be at least 1")
    if config.train.optimizer.layer_decay != 1:
        raise SettingError(
            f"train.optimizer.layer_decay={config.train.optimizer.layer_decay}: pre-training has one rate for all"
            " layers; leave it at 1 (jobs/finetune.py uses it)"
        )
