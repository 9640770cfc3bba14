"""A backbone from wherever its weights are: a run, a file of ours, a published checkpoint, an exported folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from itpn_core.errors import UserError, WeightsError
from itpn_core.models.backbone import Backbone
from itpn_core.models.checkpoint import infer_config, read_weights
from itpn_core.models.config import ModelConfig
from itpn_core.models.importer import LoadReport, load_checkpoint
from itpn_core.models.pyramid import PYRAMID_DIM, default_depth
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig

METADATA = "model"
"""Key of the safetensors metadata that holds the `ModelConfig` as JSON."""
_STEM = "patch_embed.proj.weight"
_PYRAMID = "align_dim_16tofpn.weight"
_FILES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """Weights under official names and what is known about them."""

    where: str
    """The place as the user gave it, and the part of it that was read."""
    model: ModelConfig
    state: dict[str, Tensor] = field(repr=False)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    """What the images were normalised with, per channel."""
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    facts: dict[str, str] = field(default_factory=dict)
    """What a model card should say: run, step, objective, data."""

    @property
    def pyramid_dim(self) -> int:
        """Width of the feature pyramid that the weights hold; 0 when they hold none."""
        return int(self.state[_PYRAMID].shape[0]) if _PYRAMID in self.state else 0

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier that the weights hold; 0 when they hold none."""
        return int(self.state["head.weight"].shape[0]) if "head.weight" in self.state else 0

    def pyramid_depth(self) -> int:
        """MLP blocks per pyramid level of the weights."""
        numbers = {key.split(".")[1] for key in self.state if key.startswith("block_16to8.")}
        return len(numbers) or default_depth(self.model)

    def build(
        self, *, pyramid: bool = True, with_pyramid: bool = True, **overrides: Any
    ) -> tuple[Backbone, LoadReport]:
        """The backbone or classifier with these weights, and what became of every tensor.

        Args:
            pyramid: build the feature pyramid: with the weights' own, else (where the weights hold none) a new one.
            with_pyramid: False leaves a pyramid untrained although the weights hold one (for comparisons).
            overrides: fields of `ModelConfig`, and arguments of `Backbone`.
        """
        fields = {name: overrides.pop(name) for name in ModelConfig.__dataclass_fields__.keys() & overrides.keys()}
        config = replace(self.model, **fields)
        classes = overrides.setdefault("num_classes", self.num_classes)
        if pyramid:
            overrides.setdefault("pyramid_dim", self.pyramid_dim or PYRAMID_DIM)
            overrides.setdefault("pyramid_depth", self.pyramid_depth())
        pooled = bool(classes) and "fc_norm.weight" in self.state and not (pyramid and config.is_fast)
        overrides.setdefault("final_norm", "pooled" if pooled else "tokens")
        backbone = Backbone(config, **overrides)
        state = (
            self.state if with_pyramid else {k: v for k, v in self.state.items() if not k.startswith(_PYRAMID_PARTS)}
        )
        report = load_checkpoint(backbone, state, quiet=True)
        return backbone, replace(report, source=self.where)


_PYRAMID_PARTS = ("align_dim_", "fpn_modules.", "split_", "block_16to8", "block_8to4")


def read_source(place: str, store: StoreConfig | None = None, *, num_heads: int = 0) -> Source:
    """Reads weights, wherever they are.

    Args:
        place: a run's folder or URI (its newest whole checkpoint, averaged weights where the run keeps them), a
            `.safetensors` of ours (its metadata describes the model), a published `.pt` or `.pth` (described by its
            keys), or a folder written by `jobs/export.py`.
        store: endpoint and time limits of object stores.
        num_heads: attention heads of a published file whose keys do not tell; 0 = 64 wide.

    Raises:
        WeightsError: there is nothing that can be read as weights of an iTPN model.
    """
    if not place:
        raise WeightsError("no source given. Name a run folder, a .safetensors file or a published .pt/.pth file.")
    if place.endswith(_FILES):
        if "://" not in place:
            return _from_file(Path(place).expanduser(), place, num_heads)
        parent, _, name = place.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
            _fetch(Folder(parent, store), name, Path(scratch, name), place)
            return _from_file(Path(scratch, name), place, num_heads)
    if "://" not in place and not Path(place).expanduser().is_dir():
        raise WeightsError(
            f"source {place!r}: no such file or folder. Give a run folder, or a {', '.join(_FILES)} file."
        )
    return _from_folder(Folder(place if "://" in place else str(Path(place).expanduser().absolute()), store), place)


def _fetch(folder: Folder, key: str, destination: Path, place: str) -> None:
    try:
        folder.download(key, destination)
    except FileNotFoundError:
        raise WeightsError(f"source {place!r}: no such object.") from None


def _from_file(path: Path, place: str, num_heads: int = 0) -> Source:
    state = read_weights(path)
    described = _metadata(path) if path.suffix == ".safetensors" else {}
    if METADATA not in described:
        return Source(place, infer_config(state, num_heads, place), state, facts={"weights": path.name})
    facts = {key: value for key, value in described.items() if key in ("step", "run", "objective", "data", "weights")}
    try:
        config = model_config(json.loads(described[METADATA]))
        mean, std = (tuple(json.loads(described[key])) if key in described else None for key in ("mean", "std"))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"source {place!r}: its metadata describes no model of this version: {error}") from None
    return Source(
        place,
        config,
        state,
        mean or IMAGENET_DEFAULT_MEAN,
        std or IMAGENET_DEFAULT_STD,
        {"weights": path.name, **facts},
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _from_folder(folder: Folder, place: str) -> Source:
    if folder.exists("run.json"):
        return _from_run(folder, place)
    names = folder.names()
    found = next((name for name in ("model.safetensors", "backbone.safetensors") if name in names), "")
    if not found:
        raise WeightsError(
            f"source {place!r}: holds neither run.json (a run) nor model.safetensors (an exported folder); it holds "
            f"{', '.join(names[:6]) or 'nothing'}. Name the run's own folder, below run.storage."
        )
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        _fetch(folder, found, Path(scratch, found), place)
        return replace(_from_file(Path(scratch, found), place), where=f"{place} ({found})")


def _from_run(folder: Folder, place: str) -> Source:
    try:
        record = json.loads(folder.get("run.json"))
        settings = nested(record["fields"])
        config = model_config(settings["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"source {place!r}: its run.json is damaged or of another version: {error}") from None
    objective = settings.get("objective") or settings.get("finetune", {})
    facts = {
        "run": folder.uri.rsplit("/", 1)[-1],
        "objective": str(objective.get("kind", "")),
        "data manifest": str(settings.get("data", {}).get("manifest", ""))[:12],
    }
    mean, std = _normalisation(settings)
    store = CheckpointStore(folder, keep=1)
    try:
        snapshot = store.load_newest()
    finally:
        store.close()
    if snapshot is not None:
        averaged, state = student_state(snapshot.tensors, place)
        facts |= {"step": str(snapshot.step), "weights": "moving average" if averaged else "live"}
        return Source(f"{place} (checkpoint of step {snapshot.step})", config, state, mean, std, _filled(facts))
    finals = [name for name in folder.names("final") if name.endswith(".safetensors")]
    if not finals:
        raise WeightsError(f"source {place!r}: this run has no checkpoint yet; let it reach its first one.")
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        path = Path(scratch, finals[0])
        _fetch(folder, f"final/{finals[0]}", path, place)
        return Source(f"{place} (final weights)", config, read_weights(path), mean, std, _filled(facts))


def _normalisation(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the run's images: of its objective, or of whatever section trained it; else ImageNet's."""
    sections = [settings.get("objective"), *settings.values()]
    found = next((s for s in sections if isinstance(s, dict) and s.get("mean") and s.get("std")), {})
    return tuple(found.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(found.get("std", IMAGENET_DEFAULT_STD))


def _filled(facts: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if value}


def student_state(tensors: Mapping[str, Tensor], place: str) -> tuple[bool, dict[str, Tensor]]:
    """The trained model's tensors out of a training checkpoint, averaged ones in the place of live ones.

    Returns:
        (whether the run keeps averaged weights, state dict under official names).

    Raises:
        WeightsError: no model inside.
    """
    stems = [key.removesuffix(_STEM) for key in tensors if key.startswith("task/") and key.endswith(_STEM)]
    prefix = next((stem for stem in stems if "student" in stem), stems[0] if stems else "")
    if not prefix:
        raise WeightsError(f"source {place!r}: its checkpoint holds no iTPN model.")
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    averages = {key.removeprefix("average/"): value for key, value in tensors.items() if key.startswith("average/")}
    inner = prefix.removeprefix("task/")
    # the average is kept under the names of the module that was trained, which may be the student or the whole task
    averages = {key.removeprefix(inner): value for key, value in averages.items()}
    state |= {key: value for key, value in averages.items() if key in state}
    return bool(averages), state


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dictionaries."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from plain (JSON) values; unknown fields are refused.

    Raises:
        UserError: values that make no model.
    """
    try:
        return ModelConfig(**{key: _tuples(value) for key, value in settings.items()})
    except TypeError as error:
        raise UserError(f"model settings of another version: {error}") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(held) for key, held in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
