"""Parts of tensors in files: which rows of a tensor a rank holds, how they are written, how any others are read back.

The files are those of `torch.distributed.checkpoint`'s safetensors storage (`HuggingFaceStorageReader`): plain
safetensors whose header says at which offset of the whole tensor each part begins, so DCP reads them too. Its own
writer is not used: it plans by collective calls on the training's process group, writes through fsspec, and knows no
commit; its default format is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARDING = "DCP_SHARDING_INFO"
VERSION = "DCP_VERSION"
SHAPES = "shapes"


class ShapeError(Exception):
    """A tensor has another shape than the one that is asked for."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows (entries of the first axis) of a tensor."""

    start: int
    rows: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


def piece_of(shape: tuple[int, ...], index: int, parts: int) -> Piece:
    """Part `index` of `parts`, as FSDP cuts: equal parts rounded up, the last ones shorter or empty."""
    rows = -(-shape[0] // parts)
    start = min(index * rows, shape[0])
    return Piece(start, min(rows, shape[0] - start), shape)


def write_pieces(path: Path, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
    """Writes tensors, of which those in `pieces` are parts."""
    if not pieces:
        save_file(dict(tensors), path)
        return
    offsets = {key: [0] * value.ndim for key, value in tensors.items()}
    for key, piece in pieces.items():
        offsets[key][0] = piece.start
    header = {
        SHARDING: json.dumps({key: {"saved_offsets": offset} for key, offset in offsets.items()}),
        VERSION: "1.0",
        SHAPES: json.dumps({key: piece.shape for key, piece in pieces.items()}),
    }
    save_file(dict(tensors), path, metadata=header)


class Assembly:
    """Puts tensors together from files that hold parts of them.

    Args:
        wanted: rows that this rank wants, by tensor; whole tensors of all others.
    """

    def __init__(self, wanted: Mapping[str, Piece]) -> None:
        self._wanted = wanted
        self._missing: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}

    def add(self, path: Path) -> None:
        """Takes the wanted rows out of one file.

        Raises:
            ShapeError: a tensor has another shape than wanted.
        """
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            offsets = json.loads(header.get(SHARDING, "{}"))
            shapes = json.loads(header.get(SHAPES, "{}"))
            for key in file.keys():  # noqa: SIM118 -- a safetensors file is no mapping
                if key in shapes or key in self._wanted:
                    part = file.get_slice(key)
                    start = offsets[key]["saved_offsets"][0] if key in offsets else 0
                    self._rows(key, part, start, tuple(shapes.get(key, part.get_shape())))
                else:
                    self.tensors[key] = file.get_tensor(key)

    def _rows(self, key: str, part: Any, start: int, shape: tuple[int, ...]) -> None:
        piece = self._wanted.get(key, Piece(0, shape[0] if shape else 1, shape))
        if piece.shape != shape:
            raise ShapeError(f"tensor {key!r} has shape {shape}, this model's has {piece.shape}")
        rows = part.get_shape()[0]
        low, high = max(start, piece.start), min(start + rows, piece.start + piece.rows)
        found = part[max(low - start, 0) : max(high - start, 0)] if high > low else part[0:0]
        if key not in self.tensors:
            self.tensors[key] = torch.empty((piece.rows, *shape[1:]), dtype=found.dtype)
            self._missing[key] = piece.rows
        if high > low:
            self.tensors[key][low - piece.start : high - piece.start] = found
            self._missing[key] -= high - low

    def incomplete(self) -> list[str]:
        """Tensors of which rows are missing."""
        return [key for key, rows in self._missing.items() if rows]
