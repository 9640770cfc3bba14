"""A copy of a model for inference: the same function with fewer operations."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models.layers import Attention, Block, FusedAttention, MlpBlock, SplitAttention, SwiGlu
from itpn_core.models.trunk import Trunk

T = TypeVar("T", bound=Trunk)


class FusedSwiGlu(nn.Module):
    """`SwiGlu` with its two input products as one."""

    def __init__(self, source: SwiGlu) -> None:
        super().__init__()
        self.w12 = _joined([source.w1, source.w2], [source.w1.bias, source.w2.bias])
        self.ffn_ln = source.ffn_ln
        self.w3 = source.w3

    def forward(self, x_C: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        gate, value = self.w12(x_C).chunk(2, -1)
        out: Tensor = self.w3(self.ffn_ln(F.silu(gate) * value))
        return out


def for_inference(model: T) -> T:
    """A frozen copy in eval mode with layer-scale folded into the products before it, and q, k, v (and w1, w2) fused.

    The copy computes the same function up to rounding and cannot be trained, loaded into or exported: keep the
    original. Its attention still offers `query`, `key` and `value`.

    Args:
        model: a backbone or student; it is not changed.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for block in [module for module in folded.modules() if isinstance(module, Block | MlpBlock)]:
            _fold_block(block)
    folded.folded = True
    return folded


def _fold_block(block: Block | MlpBlock) -> None:
    mlp = cast("Any", block.mlp)
    if block.gamma_2 is not None:
        _scale(mlp.w3 if isinstance(mlp, SwiGlu) else mlp.fc2, block.gamma_2)
        block.gamma_2 = None
    if isinstance(block, MlpBlock):
        return
    if block.gamma_1 is not None:
        _scale(block.attn.proj, block.gamma_1)
        block.gamma_1 = None
    if isinstance(block.attn, SplitAttention):
        block.attn = _fused_attention(block.attn)
    if isinstance(mlp, SwiGlu):
        block.mlp = FusedSwiGlu(mlp)


def _scale(product: Any, gamma_C: Tensor) -> None:
    """Folds a factor per output channel into a Linear or a convolution kernel."""
    product.weight.mul_(gamma_C.view(-1, *(1,) * (product.weight.ndim - 1)))
    product.bias.mul_(gamma_C)


def _joined(products: list[nn.Linear], biases: list[Tensor]) -> nn.Linear:
    weight = torch.cat([product.weight for product in products])
    fused = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return fused


def _fused_attention(source: SplitAttention) -> Attention:
    fused = FusedAttention(source.proj.in_features, source.num_heads, device="meta")
    biases: list[Tensor] = [source.q_bias, torch.zeros_like(source.q_bias), source.v_bias]
    fused.qkv = _joined([source.q_proj, source.k_proj, source.v_proj], biases)
    fused.proj = source.proj
    return fused
