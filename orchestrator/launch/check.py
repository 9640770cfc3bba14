"""Checks before anything is started: settings that cannot work together, and data that is not there."""

from __future__ import annotations

from itpn_core.pretraining.config import check_objective
from itpn_core.pretraining.tasks import FAMILY_OF
from orchestrator.config.errors import SettingError
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.preflight import open_dataset
from orchestrator.track.server import check_answers


def check(config: PretrainConfig) -> Manifest:
    """Refuses what could only fail later.

    Returns:
        The data set's manifest.

    Raises:
        UserError: one clear message for the first thing that is wrong.
    """
    _check_settings(config)
    if config.track.required:
        check_answers(config.track)
    manifest = open_dataset(config.data)
    train, val = manifest.split(config.data.train_split), manifest.split(config.data.val_split)
    batch = config.train.global_batch
    if config.data.last_batch == "drop" and train.samples < batch:
        raise SettingError(
            f"train.global_batch={batch} is larger than the split {train.name!r} with {train.samples} samples, so an"
            f" epoch would have no batch: use at most {train.samples}, or data.last_batch=short"
        )
    for key, asked, split in (("eval.bank", config.eval.bank, train), ("eval.queries", config.eval.queries, val)):
        if asked > split.samples:
            raise SettingError(
                f"{key}={asked} but the split {split.name!r} has {split.samples} samples: use at most that"
            )
    return manifest


def _check_settings(config: PretrainConfig) -> None:
    workers, batch = config.cluster.workers, config.train.global_batch
    at_least_one = {
        "cluster.workers": workers,
        "train.epochs": config.train.epochs,
        "train.log_every": config.train.log_every,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.k": config.eval.k,
        "eval.batch": config.eval.batch,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise SettingError(f"{key}={value}: it must be at least 1")
    if batch < workers:
        raise SettingError(
            f"train.global_batch={batch} is smaller than cluster.workers={workers}: every worker needs at least one"
            f" image per step; use train.global_batch>={workers} or cluster.workers<={max(batch, 1)}"
        )
    family = FAMILY_OF.get(config.objective.kind)
    if family and config.model.family != family:
        raise SettingError(
            f"model.family={config.model.family!r} does not go with objective.kind={config.objective.kind!r}:"
            f" set model.family={family}"
        )
    check_objective(config.objective)
    if config.data.image_size != config.model.img_size:
        raise SettingError(
            f"data.image_size={config.data.image_size} differs from model.img_size={config.model.img_size}:"
            " leave data.image_size at 0 to follow the model"
        )
    if config.eval.bank < config.eval.k:
        raise SettingError(
            f"eval.bank={config.eval.bank} is smaller than eval.k={config.eval.k}: neighbours would be missing"
        )
    optimizer = config.train.optimizer
    if optimizer.lr <= 0:
        raise SettingError(f"train.optimizer.lr={optimizer.lr}: it must be above 0")
    for key in ("warmup_fraction", "min_lr_ratio", "average_decay"):
        value = getattr(optimizer, key)
        if not 0 <= value < 1:
            raise SettingError(f"train.optimizer.{key}={value}: it must be in [0, 1)")
