"""One export: read, build, write each format, re-load it in a fresh process, compare, and only then keep it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from itpn_core.errors import ConfigError
from itpn_core.models.backbone import Backbone
from itpn_core.random import stream_keys, uniform
from orchestrator.checkpoint.source import Source, open_source
from orchestrator.data.folder import Folder
from orchestrator.data.store import StoreConfig
from orchestrator.export.compare import Arrays, Difference, difference, reload
from orchestrator.export.config import ExportConfig
from orchestrator.export.formats import ExportError, Program, Subject, write
from orchestrator.export.fresh import model_outputs

_IMAGES = 3


@dataclass(frozen=True)
class Row:
    """What became of one format."""

    kind: str
    place: str
    megabytes: float
    difference: Difference | None
    problem: str = ""

    @property
    def good(self) -> bool:
        """Whether the file was kept."""
        return not self.problem


def export(config: ExportConfig, store: StoreConfig | None = None) -> int:
    """Exports as asked; prints a table.

    Returns:
        0 when every format was re-loaded and found equal, 1 when any was not (it is then not kept).

    Raises:
        UserError: the source or the destination cannot be used.
    """
    if not config.dest:
        raise ConfigError("dest", "", "a folder or URI to write to is needed", "For example dest=~/itpn/exported/base")
    folder = Folder(config.dest, store)
    source = open_source(config.source, store, num_heads=config.num_heads, pyramid=True)
    subject = prepare(config, source)
    rows = [_export_one(kind, config, subject, folder) for kind in config.formats]
    _leave_record(rows, config, subject, folder)
    print(table(rows, subject))
    return 0 if all(row.good for row in rows) else 1


def prepare(config: ExportConfig, source: Source) -> Subject:
    """The model that is exported, in eval mode, at its size and with its token reduction."""
    off = {"migration": None, "gathering": None}
    given = {
        "migration": config.migration if config.migration.layers else source.model.migration,
        "gathering": config.gathering if config.gathering.window else source.model.gathering,
    }
    model, report = source.build(pyramid=bool(source.pyramid_dim))
    print(report)
    if config.image_size:
        height, width = config.image_size
        try:
            model.set_input_size((height, width))
        except ValueError as error:
            raise ConfigError("image_size", [height, width], "does not fit this model", str(error)) from None
    reduction: dict[str, Any] = off if config.plain else given
    model.set_token_reduction(**reduction)
    patch = model.config.patch_size
    size = (model.grid[0] * patch, model.grid[1] * patch)
    program = Program(model, _output(config, model), *((source.mean, source.std) if config.raw_input else ()))
    return Subject(model.eval().requires_grad_(False), program.eval(), source, size, config.batch)


def _output(config: ExportConfig, model: Backbone) -> str:
    if config.output == "logits" and not model.num_classes:
        raise ConfigError("output", "logits", "the weights hold no classifier", "Use features or maps.")
    if config.output != "auto":
        return config.output
    return "logits" if model.num_classes else "features"


def example_images(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Images for the comparison, in [0, 1]: smooth shapes and fine noise, so that all frequencies occur."""
    keys = stream_keys(0, 0, torch.arange(count), "export")
    coarse = uniform(keys, channels * 36).view(count, channels, 6, 6)
    fine = uniform(keys + 1, channels * size[0] * size[1]).view(count, channels, *size)
    smooth = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return (0.8 * smooth + 0.2 * fine).clamp(0, 1)


def _export_one(kind: str, config: ExportConfig, subject: Subject, folder: Folder) -> Row:
    images = example_images(config.batch or _IMAGES, subject.model.config.in_chans, subject.size)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (subject.source.mean, subject.source.std))
    ready = images if kind in ("pt2", "onnx") and config.raw_input else (images - mean) / std
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        written, exchange = Path(scratch, "written"), Path(scratch, "exchange")
        written.mkdir()
        exchange.mkdir()
        try:
            path = write(kind, subject, written)
            found = reload(kind, path, ready.numpy(), _settings(subject), exchange)
        except (ExportError, RuntimeError) as error:
            return Row(kind, "", 0.0, None, str(error))
        gap = difference(expected(kind, subject, ready), found, config.tolerance)
        files = [file for file in sorted(written.rglob("*")) if file.is_file()]
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        if not gap.equal:
            return Row(kind, "", megabytes, gap, _unequal(kind, gap, subject))
        for file in files:
            folder.put(file.relative_to(written).as_posix(), file)
        return Row(kind, f"{folder.uri}/{path.relative_to(written)}", megabytes, gap)


def _unequal(kind: str, gap: Difference, subject: Subject) -> str:
    text = f"{kind}: re-loaded outputs differ by {gap.largest:.3g} ({gap.where}), allowed is {gap.tolerance:.3g}"
    if subject.model.migration.active:
        text += "; with token migration a rounding difference can drop another of two nearly equal tokens"
    return f"{text}. Not kept."


def _settings(subject: Subject) -> dict[str, Any]:
    build = {**subject.build, "num_heads": subject.model.config.heads}
    return {"outputs": subject.program.names, "build": build, **subject.reduction}


@torch.no_grad()
def expected(kind: str, subject: Subject, images: Tensor) -> Arrays:
    """What the model itself computes in this process, by name of output."""
    if kind not in ("pt2", "onnx"):
        return dict(model_outputs(subject.model, images.numpy()))
    out = subject.program(images)
    found: list[Tensor] = list(out) if isinstance(out, tuple) else [out]
    arrays: list[npt.NDArray[np.float32]] = [value.numpy() for value in found]
    return dict(zip(subject.program.names, arrays, strict=True))


def _leave_record(rows: list[Row], config: ExportConfig, subject: Subject, folder: Folder) -> None:
    kept = {
        row.kind: {"largest difference": row.difference.largest, "tolerance": row.difference.tolerance}
        for row in rows
        if row.good and row.difference is not None
    }
    record: Mapping[str, Any] = {
        "source": subject.source.place,
        "facts": subject.source.facts,
        "model": asdict(
            replace(subject.model.config, migration=subject.model.migration, gathering=subject.model.gathering)
        ),
        "input": {
            "size": list(subject.size),
            "images": subject.batch or "any number",
            "pt2 and onnx take": "images in [0, 1]" if config.raw_input else "normalised images",
            "mean": list(subject.source.mean),
            "std": list(subject.source.std),
        },
        "outputs of pt2 and onnx": subject.program.names,
        "compared": kept,
    }
    folder.put("export.json", (json.dumps(record, indent=1) + "\n").encode())


def table(rows: list[Row], subject: Subject) -> str:
    """The table that a person reads."""
    height, width = subject.size
    count = subject.batch or "any number"
    lines = [
        f"images: {count} x {subject.model.config.in_chans} x {height} x {width}; pt2 and onnx return "
        f"{', '.join(subject.program.names)}",
        f"{'format':<12} {'MB':>8} {'max |difference|':>18} {'tolerance':>12}  result",
    ]
    for row in rows:
        gap = row.difference
        numbers = f"{gap.largest:>18.3g} {gap.tolerance:>12.3g}" if gap else f"{'-':>18} {'-':>12}"
        result = f"equal: {row.place}" if row.good else f"FAILED: {row.problem}"
        lines.append(f"{row.kind:<12} {row.megabytes:>8.1f} {numbers}  {result}")
    return "\n".join(lines)
