"""Weights from wherever they are: a run, a file of ours, a published checkpoint, an exported folder."""

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

from itpn_core.errors import WeightsError
from itpn_core.models.backbone import Backbone
from itpn_core.models.checkpoint import infer_config, read_weights
from itpn_core.models.config import ModelConfig
from itpn_core.models.importer import LoadReport, load_checkpoint
from itpn_core.models.pyramid import PYRAMID_DIM, default_depth
from itpn_core.reduction.model import GATHERING_TOKENS
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.config.schema import nested
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.launch.record import KEY, RunRecord

METADATA = "model"
"""Key of the safetensors metadata that holds the `ModelConfig` as JSON."""
WEIGHTS = "backbone.safetensors"
CLASSIFIER = "classifier.safetensors"
EXPORTS = tuple(f"{folder}{name}" for folder in ("final/", "weights/", "") for name in (WEIGHTS, CLASSIFIER))
"""What a run leaves, and the same files by themselves."""
_FOLDER = "model.safetensors"  # of a folder written by jobs/export.py
_FILES = (".safetensors", ".pt", ".pth", ".bin")
_FACTS = ("step", "run", "objective", "data", "weights")
_STEM = "patch_embed.proj.weight"
_PYRAMID = "align_dim_16tofpn.weight"
_PYRAMID_PARTS = ("align_dim_", "fpn_modules.", "split_", "block_16to8", "block_8to4")


@dataclass(frozen=True)
class Source:
    """Weights under official names and what is known about them.

    Attributes:
        place: where they were found, for people.
        kind: "run", "weights" (a file of ours) or "published".
        model: shape, with the reduction that they were trained with.
        state: tensors under official names.
        step: optimiser step; -1 unknown.
        mean: what the images were normalised with, per channel.
        std: as `mean`.
        facts: what a model card should say: run, step, objective, data.
        record: of the run that made them, when it lies beside them.
        folder: of that run.
    """

    place: str
    kind: str
    model: ModelConfig
    state: Mapping[str, Tensor] = field(repr=False)
    step: int = -1
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    facts: Mapping[str, str] = field(default_factory=dict)
    record: RunRecord | None = None
    folder: Folder | None = None

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
        return backbone, replace(report, source=self.place)

    def headless(self) -> Backbone:
        """What is evaluated: the backbone in evaluation mode, at its own size, without reduction or classifier.

        Raises:
            WeightsError: tensors are missing or of another shape.
        """
        norm = "pooled" if "fc_norm.weight" in self.state else "tokens"
        model, report = self.build(pyramid=False, num_classes=0, final_norm=norm)
        missing = sorted(report.missing.keys() - {GATHERING_TOKENS})
        if missing:
            raise WeightsError(f"{self.place}: lacks {', '.join(missing[:3])} of the model that its settings describe.")
        if GATHERING_TOKENS in self.state:
            # trained ones, which a later setting may ask for although the weights' own settings do not
            model.load_state_dict({GATHERING_TOKENS: self.state[GATHERING_TOKENS]}, strict=False)
        model.set_token_reduction()
        return model.eval()


def open_source(place: str, store: StoreConfig | None = None, *, num_heads: int = 0, pyramid: bool = False) -> Source:
    """Finds and reads weights.

    Args:
        place: a run's folder or URI (its exported weights, else its newest whole checkpoint, averaged weights where the
            run keeps them), a `.safetensors` of ours (its metadata describes the model), a published `.pt` or `.pth`
            (described by its keys), or a folder written by `jobs/export.py`.
        store: endpoint and time limits of object stores.
        num_heads: attention heads of a published file whose keys do not tell; 0 = 64 wide.
        pyramid: take a run's checkpoint first, which holds the pyramid of pre-training; its exports do not.

    Raises:
        WeightsError: there is nothing that can be read as weights of an iTPN model; the message says what was looked
            for.
    """
    if not place:
        raise WeightsError("no source given. Name a run folder, a .safetensors file or a published .pt/.pth file.")
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        if path.is_dir():
            return _from_folder(Folder(str(path), store), pyramid)
        if not path.is_file():
            raise WeightsError(
                f"source {path}: no such file or directory. Give a run folder, or a {', '.join(_FILES)} file."
            )
        return _from_file(path, place, num_heads)
    if place.endswith(_FILES):
        parent, _, name = place.rpartition("/")
        return _from_object(Folder(parent, store), name, place, num_heads)
    return _from_folder(Folder(place, store), pyramid)


def _from_object(folder: Folder, key: str, place: str, num_heads: int = 0) -> Source:
    """A file in a folder that may be remote."""
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        path = folder.local_path(key) or Path(scratch, Path(key).name)
        try:
            if folder.local_path() is None:
                folder.download(key, path)
        except FileNotFoundError:
            raise WeightsError(f"source {place}: no such object.") from None
        return _from_file(path, place, num_heads)


def _from_file(path: Path, place: str, num_heads: int = 0) -> Source:
    """A file of ours says in its header what it is; any other goes through the importer."""
    state = read_weights(path)
    header = _header(path, place) if path.suffix == ".safetensors" else {}
    facts = {"weights": path.name, **{key: value for key, value in header.items() if key in _FACTS and value}}
    if METADATA not in header:
        return Source(place, "published", infer_config(state, num_heads, place), state, facts=facts)
    try:
        config = model_config(json.loads(header[METADATA]), place)
        mean, std = (tuple(json.loads(header.get(key, "[]"))) for key in ("mean", "std"))
        step = int(header.get("step", "-1"))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"source {place}: its metadata describes no model of this version: {error}") from None
    mean, std = mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD
    return Source(place, "weights", config, state, step, mean, std, facts)


def _header(path: Path, place: str) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsError(f"source {place}: {error}") from None


def _from_folder(folder: Folder, pyramid: bool) -> Source:
    record = _record(folder)
    snapshot = _newest(folder) if record and pyramid else None
    found = None if snapshot else next((key for key in (*EXPORTS, _FOLDER) if folder.exists(key)), None)
    if found:
        source = _from_object(folder, found, f"{folder.uri}/{found}")
        return source if record is None else _of_run(source, folder, record)
    snapshot = snapshot or (_newest(folder) if record else None)
    if snapshot is None or record is None:
        looked, held = ", ".join((*EXPORTS, _FOLDER, "checkpoints/step-*")), ", ".join(folder.names()[:6])
        raise WeightsError(
            f"{folder.uri}: no weights there; looked for {looked} (the last beside {KEY}), the folder holds "
            f"{held or 'nothing'}. Name the run's own folder, below run.storage."
        )
    place = f"{folder.uri}/checkpoints/step-{snapshot.step:08d}"
    averaged, state = student_state(snapshot.tensors, place)
    facts = {"step": str(snapshot.step), "weights": "moving average" if averaged else "live"}
    model = model_config(_settings(record, place).get("model"), place)
    return _of_run(Source(place, "run", model, state, snapshot.step, facts=facts), folder, record)


def _newest(folder: Folder) -> Snapshot | None:
    store = CheckpointStore(folder, keep=1)
    try:
        return store.load_newest()
    finally:
        store.close()


def _record(folder: Folder) -> RunRecord | None:
    try:
        return RunRecord(**json.loads(folder.get(KEY)))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder.uri}/{KEY} is damaged or of another version: {error}") from None


def _settings(record: RunRecord, place: str) -> dict[str, Any]:
    try:
        return nested(record.fields)
    except (AttributeError, TypeError) as error:
        raise WeightsError(f"source {place}: {KEY} is damaged or of another version: {error}") from None


def _of_run(source: Source, folder: Folder, record: RunRecord) -> Source:
    """The same weights with what their run knows about them."""
    settings = _settings(record, source.place)
    trained = settings.get("objective") or settings.get("finetune") or {}
    facts = {
        **source.facts,
        "run": folder.uri.rsplit("/", 1)[-1],
        "objective": str(trained.get("kind", "")),
        "data manifest": str(settings.get("data", {}).get("manifest", ""))[:12],
    }
    return replace(
        source,
        kind="run",
        mean=tuple(trained.get("mean") or source.mean),
        std=tuple(trained.get("std") or source.std),
        facts={key: value for key, value in facts.items() if value},
        folder=folder,
        record=record,
    )


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
        raise WeightsError(f"source {place}: its checkpoint holds no iTPN model.")
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    averages = {key.removeprefix("average/"): value for key, value in tensors.items() if key.startswith("average/")}
    inner = prefix.removeprefix("task/")
    # the average is kept under the names of the module that was trained, which may be the student or the whole task
    averages = {key.removeprefix(inner): value for key, value in averages.items()}
    state |= {key: value for key, value in averages.items() if key in state}
    return bool(averages), state


def model_config(settings: Any, place: str) -> ModelConfig:
    """A `ModelConfig` from plain (JSON) values; unknown fields are refused.

    Raises:
        WeightsError: values that make no model of this version.
    """
    try:
        return ModelConfig(**settings)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"source {place}: its settings describe no model of this version: {error}") from None
