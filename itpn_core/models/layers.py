"""The layers of both families, on tokens with channels last.

Every stage-3 block, of either family, takes and returns tokens [B, N, E]; its attention exposes `query`, `key` and
`value` ([B, heads, N, width]) so that token migration and gathering can look at keys or attend across sets. Modules
are named like the published checkpoints (`blocks.8.attn.q_proj.weight`), so weights load without a key map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models.config import FAST_MLP_RATIO, ITPN_MLP_RATIO, NORM_EPS, STEM_MLP_RATIO, ModelConfig
from itpn_core.models.layout import kernel_matrix, merge_cells, split_cells, transposed_kernel_matrix

# Halves of 16 bits: 8 of them fill the 16 bytes that a GPU's fast matrix kernels read at once.
_ALIGNED = 8


def layer_norm(width: int, eps: float = NORM_EPS, **kwargs: Any) -> nn.LayerNorm:
    """LayerNorm with the eps of (nearly) every published norm."""
    return nn.LayerNorm(width, eps=eps, **kwargs)


class CellConv(nn.Conv2d):
    """A convolution whose stride is its kernel size (1, 2 or 4 cells), as one matrix product.

    Input [B, N, S, k*k*C] (the cells under the kernel already side by side), output [B, N, S, out].
    """

    def __init__(self, channels: int, out: int, side: int = 1, **kwargs: Any) -> None:
        super().__init__(channels, out, side, stride=side, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the kernel to concatenated cells."""
        return F.linear(input, kernel_matrix(self.weight), self.bias)


class CellConvTranspose(nn.ConvTranspose2d):
    """A 2x2 transposed convolution of stride 2 as one matrix product: [B, N, S, C] -> [B, N, 4S, out]."""

    def __init__(self, channels: int, out: int, **kwargs: Any) -> None:
        super().__init__(channels, out, 2, stride=2, **kwargs)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Yields the four children of every cell."""
        bias = None if self.bias is None else self.bias.repeat(4)
        return split_cells(F.linear(input, transposed_kernel_matrix(self.weight), bias))


class PatchEmbed(nn.Module):
    """The stem: each stage-1 cell from its k x k pixels (k = patch_size / 4), normalised in iTPN only."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__()
        side = config.patch_size // 4
        self.proj = nn.Conv2d(config.in_chans, config.widths[0], side, stride=side, **kwargs)
        self.norm = nn.Identity() if config.is_fast else layer_norm(config.widths[0], **kwargs)

    def forward(self, pixels_BNSK: Tensor) -> Tensor:
        """Pixels of each cell [B, N, 16, in_chans*k*k] (see `patchify`) to [B, N, 16, E/4]."""
        out: Tensor = self.norm(F.linear(pixels_BNSK, self.proj.weight.flatten(1), self.proj.bias))
        return out


class Mlp(nn.Module):
    """Linear, GELU, Linear; `conv` keeps the weights as 1x1 kernels, `sub_norm` normalises the hidden layer."""

    def __init__(self, width: int, hidden: int, *, conv: bool = False, sub_norm: bool = False, **kwargs: Any) -> None:
        super().__init__()
        linear = CellConv if conv else nn.Linear
        self.fc1 = linear(width, hidden, **kwargs)
        self.ffn_ln = layer_norm(hidden, **kwargs) if sub_norm else nn.Identity()
        self.fc2 = linear(hidden, width, **kwargs)

    def forward(self, x_C: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        if x_C.is_cuda and self.fc1.weight.shape[0] % _ALIGNED and isinstance(self.ffn_ln, nn.Identity):
            return self._aligned(x_C)
        out: Tensor = self.fc2(self.ffn_ln(F.gelu(self.fc1(x_C))))
        return out

    def _aligned(self, x_C: Tensor) -> Tensor:
        """The same with hidden channels of zeros: GPUs multiply by far faster where rows are whole 16 bytes."""
        weight_1, weight_2 = self.fc1.weight.flatten(1), self.fc2.weight.flatten(1)
        more = -weight_1.shape[0] % _ALIGNED
        hidden = F.gelu(
            F.linear(
                x_C,
                F.pad(weight_1, (0, 0, 0, more)),
                None if self.fc1.bias is None else F.pad(self.fc1.bias, (0, more)),
            )
        )
        return F.linear(hidden, F.pad(weight_2, (0, more)), self.fc2.bias)


class SwiGlu(nn.Module):
    """w3(LN(silu(w1 x) * w2 x)), the feed-forward layer of Fast-iTPN's stage 3."""

    def __init__(self, width: int, hidden: int, **kwargs: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, **kwargs)
        self.w2 = nn.Linear(width, hidden, **kwargs)
        self.ffn_ln = layer_norm(hidden, **kwargs)
        self.w3 = nn.Linear(hidden, width, **kwargs)

    def forward(self, x_C: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        out: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x_C)) * self.w2(x_C)))
        return out


class Attention(nn.Module, ABC):
    """Multi-head attention; subclasses say how q, k and v are projected."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.relative_position_bias_table = None
        self.proj = nn.Linear(width, width, **kwargs)

    def heads_first(self, x_BNE: Tensor) -> Tensor:
        """[B, N, E] to [B, heads, N, head width]; strides change, nothing is copied."""
        return x_BNE.view(*x_BNE.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    @abstractmethod
    def query(self, x_BNE: Tensor) -> Tensor:
        """Queries [B, heads, N, head width]."""

    @abstractmethod
    def key(self, x_BNE: Tensor) -> Tensor:
        """Keys [B, heads, N, head width]."""

    @abstractmethod
    def value(self, x_BNE: Tensor) -> Tensor:
        """Values [B, heads, N, head width]."""

    def qkv_heads(self, x_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens."""
        return self.query(x_BNE), self.key(x_BNE), self.value(x_BNE)

    def attend(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention and output projection: [B, N, E]. `bias` broadcasts to [B, heads, N, M]."""
        mask = None if bias is None else bias.to(q_BHND.dtype)
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, attn_mask=mask)
        out: Tensor = self.proj(out_BHND.transpose(1, 2).flatten(2))
        return out

    def forward(self, x_BNE: Tensor, bias: Tensor | None = None) -> Tensor:
        """Self-attention over N tokens: [B, N, E] to [B, N, E]."""
        return self.attend(*self.qkv_heads(x_BNE), bias)


class SplitAttention(Attention):
    """Fast-iTPN: three projections, a bias on queries and values only."""

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__(width, heads, **kwargs)
        self.q_bias = nn.Parameter(torch.zeros(width, **kwargs))
        self.v_bias = nn.Parameter(torch.zeros(width, **kwargs))
        self.q_proj = nn.Linear(width, width, bias=False, **kwargs)
        self.k_proj = nn.Linear(width, width, bias=False, **kwargs)
        self.v_proj = nn.Linear(width, width, bias=False, **kwargs)

    def query(self, x_BNE: Tensor) -> Tensor:
        """Queries [B, heads, N, head width]."""
        return self.heads_first(F.linear(x_BNE, self.q_proj.weight, self.q_bias))

    def key(self, x_BNE: Tensor) -> Tensor:
        """Keys [B, heads, N, head width]."""
        return self.heads_first(self.k_proj(x_BNE))

    def value(self, x_BNE: Tensor) -> Tensor:
        """Values [B, heads, N, head width]."""
        return self.heads_first(F.linear(x_BNE, self.v_proj.weight, self.v_bias))


class FusedAttention(Attention):
    """iTPN: one qkv projection with bias, and a relative position bias where the model has one.

    Args:
        width: token width E.
        heads: attention heads.
        bias_grid: (rows, columns) the bias table is sized for, None for no bias.
        kwargs: device and dtype.
    """

    def __init__(self, width: int, heads: int, *, bias_grid: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(width, heads, **kwargs)
        self.qkv = nn.Linear(width, 3 * width, **kwargs)
        if bias_grid is not None:
            entries = (2 * bias_grid[0] - 1) * (2 * bias_grid[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads, **kwargs))

    def _part(self, x_BNE: Tensor, part: int) -> Tensor:
        weight, bias = self.qkv.weight.chunk(3)[part], self.qkv.bias.chunk(3)[part]
        return self.heads_first(F.linear(x_BNE, weight, bias))

    def query(self, x_BNE: Tensor) -> Tensor:
        """Queries [B, heads, N, head width]."""
        return self._part(x_BNE, 0)

    def key(self, x_BNE: Tensor) -> Tensor:
        """Keys [B, heads, N, head width]."""
        return self._part(x_BNE, 1)

    def value(self, x_BNE: Tensor) -> Tensor:
        """Values [B, heads, N, head width]."""
        return self._part(x_BNE, 2)

    def qkv_heads(self, x_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, in one matrix product."""
        q_BHND, k_BHND, v_BHND = (self.heads_first(part) for part in self.qkv(x_BNE).chunk(3, -1))
        return q_BHND, k_BHND, v_BHND


def _residual(y: Tensor, gamma: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """Layer-scale and stochastic depth of one branch; `keep_B` holds 0 or 1 / (1 - rate) per sample."""
    if gamma is not None:
        y = y * gamma
    if keep_B is not None:
        y = y * keep_B.to(y.dtype).view(-1, *(1,) * (y.ndim - 1))
    return y


def _gamma(width: int, start: float, **kwargs: Any) -> nn.Parameter | None:
    return nn.Parameter(torch.full((width,), start, **kwargs)) if start else None


class MlpBlock(nn.Module):
    """A block of stages 1 and 2 and of the pyramid: channels only, x + MLP(LN(x)), any leading shape."""

    def __init__(self, width: int, mlp: nn.Module, layer_scale: float = 0.0, **kwargs: Any) -> None:
        super().__init__()
        self.gamma_2 = _gamma(width, layer_scale, **kwargs)
        self.norm2 = layer_norm(width, **kwargs)
        self.mlp = mlp

    def forward(self, x_BNSC: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """[B, N, S, C] to the same shape."""
        return x_BNSC + _residual(self.mlp(self.norm2(x_BNSC)), self.gamma_2, keep_B)


class Block(nn.Module):
    """A block of stage 3, the same interface for both families: attention and feed-forward, each pre-normed."""

    def __init__(
        self,
        width: int,
        attn: Attention,
        mlp: nn.Module,
        layer_scale: float = 0.0,
        eps: float = NORM_EPS,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.gamma_1 = _gamma(width, layer_scale, **kwargs)
        self.gamma_2 = _gamma(width, layer_scale, **kwargs)
        self.norm1 = layer_norm(width, eps, **kwargs)
        self.attn = attn
        self.norm2 = layer_norm(width, eps, **kwargs)
        self.mlp = mlp

    def attention_branch(self, y_BNE: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """What attention adds to the residual stream, from its projected output."""
        return _residual(y_BNE, self.gamma_1, keep_B)

    def feed_forward(self, x_BNE: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Second half of the block: x + FFN(LN(x))."""
        return x_BNE + _residual(self.mlp(self.norm2(x_BNE)), self.gamma_2, keep_B)

    def forward(self, x_BNE: Tensor, bias: Tensor | None = None, keep_B2: Tensor | None = None) -> Tensor:
        """One block over N tokens.

        Args:
            x_BNE: tokens.
            bias: None or an additive attention bias that broadcasts to [B, heads, N, N].
            keep_B2: None or stochastic-depth factors of the attention and the feed-forward branch.

        Returns:
            [B, N, E].
        """
        keep_1, keep_2 = (None, None) if keep_B2 is None else keep_B2.unbind(1)
        x_BNE = x_BNE + self.attention_branch(self.attn(self.norm1(x_BNE), bias), keep_1)
        return self.feed_forward(x_BNE, keep_2)


class ConcatMerge(nn.Module):
    """iTPN's 2x2 merge: concatenate, LN(4C), Linear(4C, 2C) without bias."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__()
        self.norm = layer_norm(4 * width, **kwargs)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False, **kwargs)

    def forward(self, x_BNSC: Tensor) -> Tensor:
        """[B, N, S, C] to [B, N, S/4, 2C]."""
        out: Tensor = self.reduction(self.norm(merge_cells(x_BNSC)))
        return out


class ConvMerge(nn.Module):
    """Fast-iTPN's 2x2 merge: LN(C), convolution of size and stride 2."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__()
        self.norm = layer_norm(width, **kwargs)
        self.reduction = CellConv(width, 2 * width, 2, **kwargs)

    def forward(self, x_BNSC: Tensor) -> Tensor:
        """[B, N, S, C] to [B, N, S/4, 2C]."""
        out: Tensor = self.reduction(merge_cells(self.norm(x_BNSC)))
        return out


def stem_block(config: ModelConfig, width: int, **kwargs: Any) -> MlpBlock:
    """A block of stage 1 or 2."""
    fast = config.is_fast
    mlp = Mlp(width, STEM_MLP_RATIO * width, conv=fast, sub_norm=fast, **kwargs)
    return MlpBlock(width, mlp, 0.0 if fast else config.layer_scale, **kwargs)


def attention_block(config: ModelConfig, grid: tuple[int, int], *, eps: float = NORM_EPS, **kwargs: Any) -> Block:
    """A block of stage 3 for a token grid of (rows, columns); `eps` is that of its two norms."""
    width, bias = config.embed_dim, config.has_relative_bias
    attn: Attention
    mlp: nn.Module
    if config.is_fast:
        attn = SplitAttention(width, config.heads, **kwargs)
        mlp = SwiGlu(width, FAST_MLP_RATIO * width, **kwargs)
    else:
        attn = FusedAttention(width, config.heads, bias_grid=grid if bias else None, **kwargs)
        mlp = Mlp(width, ITPN_MLP_RATIO * width, **kwargs)
    return Block(width, attn, mlp, config.layer_scale, eps, **kwargs)


def merge(config: ModelConfig, width: int, **kwargs: Any) -> nn.Module:
    """The 2x2 merge after a stage of `width` channels."""
    return ConvMerge(width, **kwargs) if config.is_fast else ConcatMerge(width, **kwargs)
