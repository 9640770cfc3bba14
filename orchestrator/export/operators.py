"""ONNX forms of the few PyTorch operators that the exporter does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch

# onnxscript's types describe graphs that it compiles from source, not functions that build one
op: Any = onnxscript.opset18


def stable_sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`aten::sort.stable` as TopK over the whole axis, which by its definition breaks ties by the lower index.

    Sorted in float32: TopK takes no int8, and all that token migration sorts are scores and ranks.
    """
    numbers = op.Cast(values, to=1)
    size = op.Gather(op.Shape(numbers), op.Constant(value_ints=[dim]))
    return op.TopK(numbers, size, axis=dim, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: stable_sort}
