"""Published checkpoints into our models, with a report of what happened to every tensor; and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from itpn_core.errors import WeightsError
from itpn_core.models.backbone import Backbone
from itpn_core.models.checkpoint import infer_config, read_weights, unwrap
from itpn_core.models.layout import square_side
from itpn_core.models.positions import Grid, relative_position_index, resample_bias_table, resample_positions
from itpn_core.models.pyramid import PRETRAINING_ONLY
from itpn_core.models.trunk import Trunk
from itpn_core.reduction.model import GATHERING_TOKENS

_INDEX = "relative_position_index"
_TABLE = "relative_position_bias_table"
# A classifier may start without these; everything else must come from the file.
_MAY_BE_NEW = ("head.", "fc_norm.", "norm.", GATHERING_TOKENS, *PRETRAINING_ONLY)


@dataclass
class LoadReport:
    """What became of a checkpoint: every name of the file and of the model is in exactly one list."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resampled: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for title, entries in (("resampled", self.resampled), ("renamed", self.renamed)):
            lines += [f"  {title}: {name} ({what})" for name, what in _grouped(entries)]
        lines += [f"  unused: {name} - {why}" for name, why in _grouped(self.unused)]
        lines += [f"  missing: {name} - {why}" for name, why in _grouped(self.missing)]
        return "\n".join(lines)


def _grouped(entries: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names with the same reason on one line: the first two, and how many more."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in entries.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        (", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else ""), reason)
        for reason, names in by_reason.items()
    ]


def load_checkpoint(
    model: Trunk,
    source: str | Path | Mapping[str, Any],
    *,
    grid: Grid | None = None,
    quiet: bool = False,
) -> LoadReport:
    """Loads a published or exported checkpoint into a backbone, classifier or pre-training student.

    fp16 and bf16 payloads are cast to the model's type; positions and bias tables are resampled to the model's grid; a
    pre-training checkpoint of Fast-iTPN gives its final norm to a classifier's `fc_norm`. Everything is checked before
    the first tensor is written.

    Args:
        model: what to load into; on the meta device its parameters are replaced by the file's.
        source: a file (.pt, .pth, .bin, .safetensors) or a state dict.
        grid: (rows, columns) of the checkpoint's positions when they are not square.
        quiet: do not print the report.

    Returns:
        The report.

    Raises:
        WeightsError: unreadable or wrong checkpoint; the model is as before.
    """
    if isinstance(source, Mapping):
        where, state = "state dict", unwrap(source)
    else:
        where, state = str(source), read_weights(source)
    new_state, report = plan_load(model, state, where, grid)
    target = model.state_dict()
    missing_meta = [name for name in report.missing if target[name].is_meta]
    if missing_meta:
        raise WeightsError(f"{where}: lacks {', '.join(missing_meta[:3])}, which a model on the meta device needs.")
    model.load_state_dict(new_state, strict=False, assign=any(value.is_meta for value in target.values()))
    if not quiet:
        print(report)
    return report


def plan_load(
    model: Trunk, state: Mapping[str, Tensor], where: str = "checkpoint", grid: Grid | None = None
) -> tuple[dict[str, Tensor], LoadReport]:
    """Tensors for `model.load_state_dict`, and the report; writes nothing.

    Raises:
        WeightsError: when the checkpoint is of another model.
    """
    if model.folded:
        raise WeightsError("this model was made by for_inference: load into the original and fold again.")
    _check_same_model(model, state, where)
    report, target = LoadReport(where), model.state_dict()
    old = grid or _grid_of(state[model.position_name].shape[1], model.grid, where)
    if old[0] * old[1] != state[model.position_name].shape[1]:
        raise WeightsError(f"{where}: grid={old} does not fit {state[model.position_name].shape[1]} positions.")
    source = _with_final_norm(dict(state), target, model, report)
    new_state: dict[str, Tensor] = {}
    for name, wanted in target.items():
        value = source.pop(name, None)
        if value is None:
            _require_optional(name, where, report)
            continue
        value = _fitted(name, value, wanted, old, model.grid, report)
        if value.shape == wanted.shape:
            # a copy, as a model on the meta device takes the tensor itself
            new_state[name] = value.to(wanted.dtype, copy=True)
            report.loaded.append(name)
        elif name.startswith("head."):
            report.unused[name] = f"the file's classifier is {list(value.shape)}, the model's {list(wanted.shape)}"
            report.missing[name] = "classifier of another size: keeps its initial values"
        else:
            raise WeightsError(f"{where}: {name} is {list(value.shape)}, the model has {list(wanted.shape)}.")
    report.unused |= {name: _why_unused(name) for name in source}
    return new_state, report


def _check_same_model(model: Trunk, state: Mapping[str, Tensor], where: str) -> None:
    """Refuses what cannot be the same model, in words."""
    have, want = infer_config(state, model.config.heads, where), model.config
    facts = ("is_fast", "embed_dim", "depths", "patch_size", "in_chans")
    wrong = [
        f"{name} {getattr(have, name)} (model: {getattr(want, name)})"
        for name in facts
        if getattr(have, name) != getattr(want, name)
    ]
    if have.has_relative_bias and want.has_relative_bias and have.heads != want.heads:
        wrong.append(f"num_heads {have.heads} (model: {want.heads})")
    if bool(have.layer_scale) != bool(want.layer_scale):
        wrong.append(f"layer-scale {'present' if have.layer_scale else 'absent'} (model: the opposite)")
    if have.has_relative_bias and not want.has_relative_bias:
        wrong.append("relative position bias present (model: absent)")
    if wrong:
        raise WeightsError(
            f"{where}: belongs to another model: {'; '.join(wrong)}. Build the model from the file with "
            "itpn_core.models.model_from_checkpoint, or choose the matching model name."
        )


def _grid_of(count: int, model_grid: Grid, where: str) -> Grid:
    if count == model_grid[0] * model_grid[1]:
        return model_grid
    try:
        return (square_side(count),) * 2
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def _with_final_norm(
    source: dict[str, Tensor], target: Mapping[str, Tensor], model: Trunk, report: LoadReport
) -> dict[str, Tensor]:
    """Fast-iTPN's final norm is `norm` in pre-training and `fc_norm` in classifiers."""
    if model.config.is_fast:
        for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
            if f"{new}.weight" in target and f"{new}.weight" not in source and f"{old}.weight" in source:
                for leaf in ("weight", "bias"):
                    source[f"{new}.{leaf}"] = source.pop(f"{old}.{leaf}")
                    report.renamed[f"{old}.{leaf}"] = f"the final norm is {new} here"
    return source


def _fitted(name: str, value: Tensor, wanted: Tensor, old: Grid, new: Grid, report: LoadReport) -> Tensor:
    """Resamples what depends on the grid."""
    if value.shape == wanted.shape or old == new:
        return value
    if name.endswith(_TABLE):
        fitted = resample_bias_table(value.float(), old, new)
    elif name.endswith("pos_embed"):
        fitted = resample_positions(value.float(), old, new)
    else:
        return value
    report.resampled[name] = f"{old[0]}x{old[1]} to {new[0]}x{new[1]}"
    return fitted


def _require_optional(name: str, where: str, report: LoadReport) -> None:
    if name.endswith(_TABLE):
        report.missing[name] = "no bias in the file (pixel pre-training has none): keeps its initial values"
    elif name.startswith(_MAY_BE_NEW):
        report.missing[name] = "not in the file: keeps its initial values"
    else:
        raise WeightsError(f"{where}: lacks {name}; the file is incomplete or of another model.")


def _why_unused(name: str) -> str:
    if name == _INDEX:
        return "computed from the grid"
    if name.startswith((*PRETRAINING_ONLY, "norm.")):
        return "used in pre-training only, this model has no such part"
    if name.startswith(("head.", "fc_norm.")):
        return "classifier, this model has none"
    return "unknown to this model"


def model_from_checkpoint(
    source: str | Path | Mapping[str, Any], *, num_heads: int = 0, quiet: bool = False, **kwargs: Any
) -> tuple[Backbone, LoadReport]:
    """Builds the backbone a checkpoint belongs to (options inferred from its keys) and loads it.

    A classifier head, and `fc_norm`, are built when the file has them.

    Args:
        source: a file or a state dict.
        num_heads: heads where the keys do not tell; 0 means 64 wide as published.
        quiet: do not print the report.
        kwargs: arguments of `Backbone` that override what was inferred (num_classes, img_size, pyramid_dim, ...).
    """
    state = unwrap(source) if isinstance(source, Mapping) else read_weights(source)
    where = "state dict" if isinstance(source, Mapping) else str(source)
    config = infer_config(state, num_heads, where)
    if "fc_norm.weight" in state:
        kwargs.setdefault("final_norm", "pooled")
    if "head.weight" in state:
        kwargs.setdefault("num_classes", state["head.weight"].shape[0])
    model = Backbone(config, **kwargs)
    return model, load_checkpoint(model, state, quiet=quiet)


def official_state(model: Trunk) -> dict[str, Tensor]:
    """The state dict under official names, with the index buffer that published iTPN models carry."""
    if model.folded:
        raise WeightsError("this model was made by for_inference: its weights are folded; export the original model.")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if any(name.endswith(_TABLE) for name in state):
        state[_INDEX] = relative_position_index(model.grid)
    return state


def export_checkpoint(model: Trunk, path: str | Path) -> None:
    """Writes official names: `.safetensors` as a flat file, anything else as a `.pt` with the weights under "model"."""
    state = {name: value.cpu().contiguous() for name, value in official_state(model).items()}
    if Path(path).suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path)


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The hook of timm: a checkpoint as this model wants it (its own values where the file may lack them)."""
    if not isinstance(model, Trunk):
        raise WeightsError(f"checkpoint_filter_fn serves iTPN models, not {type(model).__name__}.")
    source = unwrap(state)
    new_state, _ = plan_load(model, source)
    # timm itself removes or slices a classifier of another size
    heads: Iterable[str] = (name for name in source if name.startswith("head."))
    return {**model.state_dict(), **new_state, **{name: source[name] for name in heads}}
