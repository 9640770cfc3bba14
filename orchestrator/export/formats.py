"""Writers of the exported formats. Each leaves files in a folder and says which of them a reader is given."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from itpn_core.errors import UserError
from itpn_core.models.backbone import Backbone
from itpn_core.models.importer import export_checkpoint, official_state
from orchestrator.checkpoint.source import METADATA, Source
from orchestrator.export.card import model_card

_MOST_IMAGES = 4096
_EXAMPLES = 2


class ExportError(UserError):
    """A model cannot be written in one format; the message says which part does not fit and what to do."""


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        model: the model in eval mode, with its token reduction.
        program: what pt2 and onnx compute (see `Program`).
        source: where the weights came from.
        size: (height, width) of the images.
        batch: images per call of pt2 and onnx; 0 = any number.
    """

    model: Backbone
    program: Program
    source: Source
    size: tuple[int, int]
    batch: int

    @property
    def metadata(self) -> dict[str, str]:
        """What a safetensors file says about itself, enough to build the model again."""
        config = {**asdict(self.model.config), **self.reduction, "img_size": self.size[0]}
        plain = {"step": "-1", **{k: v for k, v in self.source.facts.items() if k in ("step", "run", "objective")}}
        mean, std = json.dumps(self.source.mean), json.dumps(self.source.std)
        return {METADATA: json.dumps(config), "mean": mean, "std": std, "format": "pt", **plain}

    @property
    def reduction(self) -> dict[str, Any]:
        """Token migration and gathering as plain values."""
        return {"migration": asdict(self.model.migration), "gathering": asdict(self.model.gathering)}

    @property
    def build(self) -> dict[str, Any]:
        """Arguments of `Backbone` that rebuild the model."""
        model = self.model
        depth = self.source.pyramid_depth() if model.pyramid_dim else 0
        norm = "tokens" if isinstance(model.fc_norm, nn.Identity) else "pooled"
        pyramid = {"pyramid_dim": model.pyramid_dim, "pyramid_depth": depth}
        return {"img_size": list(self.size), "final_norm": norm, **pyramid}


class Program(nn.Module):
    """What a pt2 or ONNX file computes.

    Args:
        model: in eval mode.
        output: "logits", "features" (what a classifier would see) or "maps" (four levels, finest first).
        mean: of the pixels, where the program normalises; None takes normalised images.
        std: as `mean`.
    """

    mean: Tensor | None
    std: Tensor

    def __init__(
        self, model: Backbone, output: str, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(shape))
        self.register_buffer("std", None if std is None else torch.tensor(std).view(shape))

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        patch = self.model.config.patch_size
        strides = [max(1, patch * 2**level // 4) for level in range(4)]
        return [f"map_stride_{stride}" for stride in strides] if self.output == "maps" else [self.output]

    def forward(self, images_BCHW: Tensor) -> Any:
        """One tensor, or a tuple of maps."""
        if self.mean is not None:
            images_BCHW = (images_BCHW - self.mean) / self.std
        if self.output == "maps":
            return tuple(self.model.forward_intermediates(images_BCHW, intermediates_only=True))
        if self.output == "features" and self.model.num_classes:
            out, _ = self.model.attended(images_BCHW)
            survivors_BN = out.survivors if self.model.pools_survivors else None
            return self.model.forward_head(self.model.norm(out.tokens), pre_logits=True, survivors_BN=survivors_BN)
        return self.model(images_BCHW)


def write(kind: str, subject: Subject, folder: Path) -> Path:
    """Writes one format.

    Args:
        kind: one of `orchestrator.export.config.FORMATS`.
        subject: what to write.
        folder: an empty folder.

    Returns:
        The file or folder that a reader opens.

    Raises:
        ExportError: this model cannot be written so.
    """
    return _WRITERS[kind](subject, folder)


def _safetensors(subject: Subject, folder: Path) -> Path:
    path = folder / "model.safetensors"
    state = {name: value.cpu().contiguous() for name, value in official_state(subject.model).items()}
    save_file(state, path, metadata=subject.metadata)
    return path


def _official(subject: Subject, folder: Path) -> Path:
    path = folder / "official.pt"
    export_checkpoint(subject.model, path)
    return path


# What timm builds when `model_args` say everything about the shape: any entry point of the family will do.
_ENTRY = {
    "fast": "fast_itpn_base_3324_patch16_224",
    "itpn_clip": "itpn_base_3324_patch16_224",
    "itpn_pixel": "itpn_pixel_base_3324_patch16_224",
}


def _timm(subject: Subject, folder: Path) -> Path:
    """A folder in the layout of the Hugging Face hub, which timm opens as `local-dir:<folder>`."""
    top = folder / "timm"
    top.mkdir()
    _safetensors(subject, top)
    (top / "config.json").write_text(json.dumps(timm_config(subject), indent=2) + "\n", encoding="utf-8")
    (top / "README.md").write_text(model_card(subject), encoding="utf-8")
    return top


def timm_config(subject: Subject) -> dict[str, Any]:
    """`config.json` of the folder, as timm reads it."""
    model, (height, width) = subject.model, subject.size
    channels = model.config.in_chans
    shape = {k: v for k, v in asdict(model.config).items() if k not in ("family", "img_size", "drop_path_rate")}
    arguments = {**shape, **subject.reduction, **subject.build, "num_classes": model.num_classes}
    return {
        "architecture": _ENTRY[model.config.family],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": json.loads(json.dumps(arguments)),
        "pretrained_cfg": {
            "tag": "exported",
            "custom_load": False,
            "input_size": [channels, height, width],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(subject.source.mean),
            "std": list(subject.source.std),
            "num_classes": model.num_classes,
            "pool_size": [height // model.config.patch_size, width // model.config.patch_size],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _traced(subject: Subject, kind: str) -> torch.export.ExportedProgram:
    """The model as a graph for any number of images (or a fixed one) of one size."""
    count = subject.batch or _EXAMPLES
    example = torch.zeros(count, subject.model.config.in_chans, *subject.size)
    shapes = None if subject.batch else ({0: torch.export.Dim("batch", min=1, max=_MOST_IMAGES)},)
    try:
        with torch.no_grad():
            # the plan of a token reduction is made of real tensors only outside of tracing, and is kept
            subject.program(example[:1])
            return torch.export.export(subject.program, (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many kinds; all of them mean that the graph cannot be captured
        raise ExportError(
            f"{kind}: torch.export cannot capture this model ({_first_line(error)}). Try batch=1, or leave {kind} out "
            "of formats."
        ) from error


def _pt2(subject: Subject, folder: Path) -> Path:
    path = folder / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_traced(subject, "pt2"), path)
    return path


def _onnx(subject: Subject, folder: Path) -> Path:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"onnx: {' and '.join(missing)} not installed; run pip install 'itpn-orchestrator[export]'.")
    from orchestrator.export.operators import TRANSLATIONS

    path = folder / "model.onnx"
    # the fused attention operators of CPU and GPU leave other strides than their decomposition, which then fails
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        traced = _traced(subject, "onnx")
        try:
            program = torch.onnx.export(
                traced,
                input_names=["images"],
                output_names=subject.program.names,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except Exception as error:  # every failure of the converter is about one operator
            raise ExportError(_operator_message(error, subject)) from error
    assert program is not None  # noqa: S101 - no file name was given
    program.save(path)
    return path


def _operator_message(error: Exception, subject: Subject) -> str:
    found = re.search(r"OpOverload\(op='([^']+)', overload='([^']+)'\)", str(error))
    what = (
        f"the operator {found[1]}.{found[2]} has no ONNX form" if found else f"conversion failed: {_first_line(error)}"
    )
    rule = subject.model.migration.rule
    hint = (
        f"It comes from migration.rule={rule}: use rule=redundancy, or plain=true."
        if subject.model.migration.active and rule == "random"
        else "Leave onnx out of formats, or export without token reduction (plain=true)."
    )
    return f"onnx: {what}. {hint}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_WRITERS = {"safetensors": _safetensors, "official": _official, "timm": _timm, "pt2": _pt2, "onnx": _onnx}
