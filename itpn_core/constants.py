"""Small constant tensors that a step needs on its device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one-dimensional tensor of these values, made once: a copy from the host would wait for all queued work.

    In code that is being compiled it becomes part of the graph instead.

    Args:
        values: its elements.
        dtype: type of the elements.
        device: where it is; it is shared, so nobody may write into it.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept(values, dtype, device)


@functools.lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # else it could never be part of a backward pass
        return torch.tensor(values, dtype=dtype, device=device)
