"""Number formats of the training step: automatic mixed precision, and the loss scale that fp16 needs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

GROWTH_INTERVAL = 2000
LARGEST = 2.0**24


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced precision of matrix products, or None: "auto" is bf16 where the device computes it, else fp32."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and _has_bf16(device)) else None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Elsewhere bf16 would be emulated, which is slower than fp32.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def agreed_precision(precision: str, device: torch.device, world: int) -> str:
    """What "auto" comes to for a group: bf16 where every rank's device computes it, else fp32. Collective."""
    if precision != "auto":
        return precision
    mine = "bf16" if _has_bf16(device) else "fp32"
    found = [mine] * world
    if world > 1:
        dist.all_gather_object(found, mine)
    return mine if set(found) == {mine} else "fp32"


class LossScale:
    """Keeps small fp16 gradients above zero: the loss is multiplied before the backward pass, gradients divided after.

    As in Micikevicius et al. 2018 ("Mixed precision training"): halved when a gradient overflows, whose step is left
    out, and doubled after `GROWTH_INTERVAL` steps without one. Everything stays on the device, and `tensor` belongs to
    the training state. For other formats the scale is 1 and never moves.

    Args:
        enabled: whether gradients are fp16.
        first: scale of the first step.
        device: of the gradients.
    """

    def __init__(self, enabled: bool, first: float, device: torch.device) -> None:
        self.enabled = enabled
        self.tensor = torch.tensor([first if enabled else 1.0, 0.0], device=device)
        """[scale, steps since it last moved]."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass gives scaled gradients."""
        return loss * self.tensor[0] if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divides the gradients; those that overflowed stay infinite."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.tensor[0])

    @torch.no_grad()
    def update(self, norm: Tensor) -> Tensor:
        """Moves the scale after a step with this gradient norm.

        Returns:
            1 where the step overflowed by reason of the scale, 0 where the gradient may be used or is bad by itself.
        """
        if not self.enabled:
            return torch.zeros_like(norm, dtype=torch.float32)
        scale, calm = self.tensor
        overflowed = ~torch.isfinite(norm) & (scale > 1)
        calm = torch.where(overflowed, 0.0, calm + 1)
        grown = calm >= GROWTH_INTERVAL
        moved = torch.where(overflowed, scale / 2, torch.where(grown, scale * 2, scale)).clamp(1.0, LARGEST)
        self.tensor.copy_(torch.stack([moved, torch.where(grown, 0.0, calm)]))
        as_number: Tensor = overflowed.to(torch.float32)
        return as_number
