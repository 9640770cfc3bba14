"""Weights that can be evaluated: a run of ours, an exported file of ours, or a published checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from itpn_core.errors import UserError, WeightsError
from itpn_core.models import Backbone, ModelConfig, build_backbone, load_checkpoint
from itpn_core.models.checkpoint import infer_config, read_weights
from itpn_core.reduction.model import GATHERING_TOKENS
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.config.errors import SettingError
from orchestrator.config.schema import flatten
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.launch.record import KEY, RunRecord

WEIGHTS = "backbone.safetensors"
CLASSIFIER = "classifier.safetensors"
EXPORTS = tuple(f"{folder}{name}" for folder in ("final/", "weights/", "") for name in (WEIGHTS, CLASSIFIER))
# Settings that describe the weights' training size, which an evaluation may change.
_FREE = ("img_size", "drop_path_rate", "layer_scale_init", "migration", "gathering")
# The data set is named by the user; at which size it is shown follows from the model unless asked otherwise.
_NOT_INHERITED = ("data.manifest", "data.image_size")


@dataclass(frozen=True)
class Source:
    """Weights and what is known about them.

    Attributes:
        place: where they were found, for people.
        kind: "run", "weights" (a file of ours) or "published".
        model: shape, with the reduction that they were trained with.
        state: tensors under official names.
        step: optimiser step; -1 unknown.
        record: of the run that made them, when it lies beside them.
        folder: of that run.
    """

    place: str
    kind: str
    model: ModelConfig
    state: Mapping[str, Tensor]
    step: int = -1
    record: RunRecord | None = None
    folder: Folder | None = None

    def settings(self) -> dict[str, Any]:
        """Settings by dotted key that an evaluation starts from: the run's own, else the model's shape."""
        model = {f"model.{key}": value for key, value in flatten(json.loads(json.dumps(asdict(self.model)))).items()}
        fields = dict(self.record.fields) if self.record else {}
        for name in ("mean", "std"):
            if f"finetune.{name}" in fields:
                fields[f"objective.{name}"] = fields[f"finetune.{name}"]
        return {**{key: value for key, value in fields.items() if key not in _NOT_INHERITED}, **model}

    def build(self) -> Backbone:
        """The headless backbone with these weights, at their own size and without reduction.

        Raises:
            WeightsError: tensors are missing or of another shape.
        """
        classifier = "fc_norm.weight" in self.state
        if classifier or self.kind == "published":
            model = Backbone(self.model, final_norm="pooled" if classifier else "tokens")
            load_checkpoint(model, self.state, quiet=True)
            model.set_token_reduction()
            return model.eval()
        model = build_backbone(self.model)
        wanted = model.state_dict()
        missing = sorted(wanted.keys() - self.state.keys() - {GATHERING_TOKENS})
        if missing:
            raise WeightsError(f"{self.place}: lacks {', '.join(missing[:3])} of the model that its settings describe.")
        names = [name for name in (*wanted, GATHERING_TOKENS) if name in self.state]
        try:
            model.load_state_dict({name: self.state[name] for name in names}, strict=False)
        except RuntimeError as error:
            raise WeightsError(f"{self.place}: {str(error).splitlines()[-1].strip()}") from None
        model.set_token_reduction()
        return model.eval()


def open_source(place: str, store: StoreConfig) -> Source:
    """Finds weights.

    Args:
        place: a run directory or URI (its exported weights, else its newest whole checkpoint), the folder or path of an
            exported `backbone.safetensors`, or a published checkpoint file.
        store: how an object store is reached.

    Raises:
        UserError: nothing is there, or it is not what it seems; the message says what was looked for.
    """
    if not place:
        raise SettingError(
            "evaluate.checkpoint is empty: name a run directory, a .safetensors file of this project or a published"
            " .pth file, for example --checkpoint ~/itpn/runs/NAME"
        )
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        if path.is_file():
            return _from_file(path, str(path))
        if not path.is_dir():
            raise WeightsError(f"checkpoint {path}: no such file or directory.")
        place = str(path)
    elif Path(place).suffix:
        return _from_remote_file(place, store)
    return _from_folder(Folder(place, store))


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


def _from_remote_file(uri: str, store: StoreConfig) -> Source:
    parent, _, name = uri.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        path = Path(scratch, name)
        try:
            Folder(parent, store).download(name, path)
        except FileNotFoundError:
            raise WeightsError(f"checkpoint {uri}: no such object.") from None
        return _from_file(path, uri)


def _from_folder(folder: Folder) -> Source:
    record = _record(folder)
    found = next((key for key in EXPORTS if folder.exists(key)), None)
    if found:
        with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
            path = folder.local_path(found) or Path(scratch, WEIGHTS)
            if folder.local_path() is None:
                folder.download(found, path)
            source = _from_file(path, f"{folder.uri}/{found}")
        return Source(source.place, "run", source.model, source.state, source.step, record, folder)
    snapshot = CheckpointStore(folder, keep=1).load_newest()
    if snapshot is None or record is None:
        looked = ", ".join((*EXPORTS, "checkpoints/step-*"))
        raise WeightsError(f"{folder.uri}: no weights there; looked for {looked} beside {KEY}.")
    place = f"{folder.uri}/checkpoints/step-{snapshot.step:08d}"
    return Source(place, "run", _recorded_model(record), _student(snapshot), snapshot.step, record, folder)


def _record(folder: Folder) -> RunRecord | None:
    try:
        return RunRecord(**json.loads(folder.get(KEY)))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder.uri}/{KEY} is not a run record of this version: {error}") from None


def _recorded_model(record: RunRecord) -> ModelConfig:
    """The shape in a run record, whose keys are dotted and whose tuples are lists."""
    return _model_config(_nested({k: v for k, v in record.fields.items() if k.startswith("model.")})["model"])


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def _model_config(values: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**{**values, "depths": tuple(values["depths"])})


def _student(snapshot: Snapshot) -> dict[str, Tensor]:
    """The student's tensors, averaged where the run keeps an average (those are what it evaluates and exports)."""
    state: dict[str, Tensor] = {}
    for head in ("task/student.", "average/student."):
        state |= {k.removeprefix(head): v for k, v in snapshot.tensors.items() if k.startswith(head)}
    return state


def _from_file(path: Path, place: str) -> Source:
    """A file of ours says in its header what it is; any other goes through the importer."""
    state = read_weights(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
        except SafetensorError as error:
            raise WeightsError(f"checkpoint {place}: {error}") from None
        if "model" in header:
            return Source(place, "weights", _model_config(json.loads(header["model"])), state, int(header["step"]))
    return Source(place, "published", infer_config(state, where=place), state)


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
