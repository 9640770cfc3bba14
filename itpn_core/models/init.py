"""How each family's weights start."""

from __future__ import annotations

from collections.abc import Iterator
from math import log, sqrt

from torch import Tensor, nn

from itpn_core.models.trunk import Trunk

# Sub-LN models keep the update size constant over depth by starting these larger (published Fast-iTPN code).
_FAST_SCALED = ("mlp.fc1", "mlp.fc2", "mlp.w1", "mlp.w2", "mlp.w3", "attn.proj", "attn.v_proj")


def _products(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and flattened weights of every matrix product; their biases are set to zero on the way."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            yield name, module.weight.flatten(1)


def init_fast(model: Trunk) -> None:
    """Fast-iTPN: xavier-normal products, those named in `_FAST_SCALED` times sqrt(ln(2 * depth3))."""
    scale = sqrt(log(2 * model.config.depths[2]))
    for name, weight in _products(model):
        nn.init.xavier_normal_(weight, gain=scale if name.endswith(_FAST_SCALED) else 1.0)
    model.init_positions()


def init_itpn(model: Trunk) -> None:
    """iTPN: truncated normal 0.02 (CLIP flavour) or xavier-uniform (pixel flavour), zero biases."""
    pixel = model.config.family == "itpn_pixel"
    for _, weight in _products(model):
        nn.init.xavier_uniform_(weight) if pixel else nn.init.trunc_normal_(weight, std=0.02)
    model.init_positions()


def init_head(head: nn.Module, scale: float = 0.001) -> None:
    """A classifier head that starts near zero, as in the published fine-tuning."""
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02 * scale)
        nn.init.zeros_(head.bias)
