"""Small constant tensors that a step needs on its device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one-dimensional tensor of these values, made once: a copy from the host would wait for all queued work.

    Args:
        values: its elements.
        dtype: type of the elements.
        device: where it is; it is shared, so nobody may write into it.
    """
    with torch.inference_mode(mode=False):  # else it could never be part of a backward pass
        return torch.tensor(values, dtype=dtype, device=device)
