"""Which weights an evaluation means, and what they say about its settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from itpn_core.models.config import ModelConfig
from orchestrator.checkpoint.source import EXPORTS, Source, open_source
from orchestrator.config.errors import SettingError
from orchestrator.config.schema import flatten, leaves
from orchestrator.config.tree import EvaluateConfig
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig

# Settings that describe the weights' training size, which an evaluation may change.
_FREE = ("img_size", "drop_path_rate", "layer_scale_init", "migration", "gathering")
# The data set is named by the user; at which size it is shown follows from the model unless asked otherwise.
_NOT_INHERITED = ("data.manifest", "data.image_size")
C = TypeVar("C", bound=EvaluateConfig)


def checkpoint_settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the named checkpoint says about itself: settings by dotted key, over which recipe and command line go."""
    known = {leaf.key for leaf in leaves(EvaluateConfig)}
    found = settings_of(open_checkpoint(find_checkpoint(config)))
    return {key: value for key, value in found.items() if key in known}  # a classifier's run has settings of its own


def settings_of(source: Source) -> dict[str, Any]:
    """Settings by dotted key that an evaluation starts from: the run's own, else the model's shape."""
    model = {f"model.{key}": value for key, value in flatten(json.loads(json.dumps(asdict(source.model)))).items()}
    fields = dict(source.record.fields) if source.record else {}
    for name in ("mean", "std"):
        if f"finetune.{name}" in fields:
            fields[f"objective.{name}"] = fields[f"finetune.{name}"]
    return {**{key: value for key, value in fields.items() if key not in _NOT_INHERITED}, **model}


def open_checkpoint(config: EvaluateConfig) -> Source:
    """The weights that a configuration names.

    Raises:
        UserError: none are named, or they cannot be read.
    """
    if not config.evaluate.checkpoint:
        raise SettingError(
            "evaluate.checkpoint is empty: name a run directory, a .safetensors file of this project or a published"
            " .pth file, for example --checkpoint ~/itpn/runs/NAME"
        )
    return open_source(config.evaluate.checkpoint, config.data.store)


def find_checkpoint(config: C) -> C:
    """The same configuration with a checkpoint that is a place: a plain word means the newest finished run so named.

    Raises:
        SettingError: there is no such run.
    """
    word = config.evaluate.checkpoint
    if not word or "/" in word or "." in word or Path(word).exists():
        return config
    place = newest_run(config.run.storage, word, config.data.store)
    return replace(config, evaluate=replace(config.evaluate, checkpoint=place))


def newest_run(storage: str, name: str, store: StoreConfig) -> str:
    """Place of the newest finished run of a name, or of a recipe (whose runs are called `<recipe>-<8 hex>`).

    Raises:
        SettingError: there is none.
    """
    folder = Folder(storage, store)
    named = [run for run in folder.names() if run == name or run.startswith(f"{name}-")]
    finished = [run for run in named if folder.exists(f"{run}/{EXPORTS[0]}")]
    if not finished:
        hint = "run `make pretrain` first, or name a checkpoint" if name == "first_run" else "name a checkpoint"
        raise SettingError(f"no finished run {name!r} in {storage}: {hint}, for example --checkpoint PATH")
    newest = max(finished, key=lambda run: folder.modified(f"{run}/{EXPORTS[0]}"))
    return f"{storage}/{newest}"


def check_shape(asked: ModelConfig, source: Source) -> None:
    """Refuses settings that describe another model than the checkpoint's.

    Raises:
        SettingError: names every differing setting.
    """
    wanted, found = asdict(asked), asdict(source.model)
    differing = [
        f"model.{name}={wanted[name]!r} (checkpoint: {found[name]!r})"
        for name in found
        if name not in _FREE and wanted[name] != found[name]
    ]
    if differing:
        raise SettingError(
            f"{source.place} holds another model: {', '.join(differing)}. Leave these settings out; the checkpoint says"
            " what it is"
        )
