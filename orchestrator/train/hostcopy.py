"""Copies of device tensors on the host, into memory that is made once.

Fresh memory costs more than the copy: the kernel has to clear every page of it. So the buffers of the first checkpoint
are used again; whoever writes them must be done before the next copy begins.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Buffers on the host for one set of tensors; page-locked when the tensors live on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors by name; the result is overwritten by the next call."""
        sources = {name: tensor.detach() for name, tensor in tensors.items()}
        for name, source in sources.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        buffers = {name: self._buffers[name] for name in sources}
        cuda = any(source.is_cuda for source in sources.values())
        for name, source in sources.items():
            # One by one: between CPU tensors this runs on all cores, `torch._foreach_copy_` on one.
            buffers[name].copy_(source, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()
        return buffers
