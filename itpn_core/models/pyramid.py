"""The attention-free feature pyramid of both families (part of pre-training and of dense tasks)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from itpn_core.models.config import ITPN_MLP_RATIO, ModelConfig
from itpn_core.models.layers import CellConv, CellConvTranspose, Mlp, MlpBlock, layer_norm
from itpn_core.models.layout import split_cells
from itpn_core.models.trunk import StemFeatures, Trunk

PYRAMID_DIM = 256


# Beginnings of the names that only pre-training (or the pyramid, which a backbone has on request) uses.
PRETRAINING_ONLY = (
    "mask_token",
    "align_dim_",
    "fpn_modules.",
    "split_",
    "block_",
    "decoder_",
    "lm_head.",
    "lm_cls_head.",
    "cls_pt_layers.",
    "norm_cls.",
)


class Pyramid(NamedTuple):
    """Maps [B, C, H, W]: the stage-3 output and the pyramid levels.

    For 16-pixel patches the strides are 16, 16, 8 and 4; in general patch, patch, patch / 2 and patch / 4.
    """

    x16: Tensor
    p16: Tensor
    p8: Tensor
    p4: Tensor


class Levels(NamedTuple):
    """Pyramid levels as cells of each patch: p16 [B, N, 1, F], p8 [B, N, 4, F], p4 [B, N, 16, F]."""

    p16: Tensor
    p8: Tensor
    p4: Tensor


class LinearSplit(nn.Module):
    """iTPN's split: LN, Linear to four children, pixel shuffle; the children stand row before column."""

    def __init__(self, width: int, out: int, **kwargs: Any) -> None:
        super().__init__()
        self.norm = layer_norm(width, **kwargs)
        self.reduction = nn.Linear(width, 4 * out, bias=False, **kwargs)

    def forward(self, x_BNSC: Tensor) -> Tensor:
        """[B, N, S, C] to [B, N, 4S, out]."""
        weight = self.reduction.weight
        # swap the children in the weight, not in the activations
        cells_first = weight.view(2, 2, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        return split_cells(F.linear(self.norm(x_BNSC), cells_first))


class ConvSplit(nn.Module):
    """Fast-iTPN's split: LN, transposed convolution of size and stride 2."""

    def __init__(self, width: int, out: int, **kwargs: Any) -> None:
        super().__init__()
        self.norm = layer_norm(width, **kwargs)
        self.reduction = CellConvTranspose(width, out, **kwargs)

    def forward(self, x_BNSC: Tensor) -> Tensor:
        """[B, N, S, C] to [B, N, 4S, out]."""
        children: Tensor = self.reduction(self.norm(x_BNSC))
        return children


def default_depth(config: ModelConfig) -> int:
    """MLP blocks per level of the published pyramids."""
    return 2 if config.family == "itpn_pixel" else 1


def _block(config: ModelConfig, width: int, **kwargs: Any) -> MlpBlock:
    hidden = width * 8 // 3 if config.is_fast else ITPN_MLP_RATIO * width
    return MlpBlock(width, Mlp(width, hidden, conv=config.is_fast, **kwargs), **kwargs)


class PyramidTrunk(Trunk):
    """A trunk with the feature pyramid; `levels` is the one definition of what the pyramid computes.

    Args:
        config: shape of the model.
        pyramid_dim: width F of every level.
        pyramid_depth: MLP blocks per level; 0 takes the family's (2 in itpn_pixel, else 1).
        img_size: (height, width) the position parameters are sized for.
        kwargs: device and dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        pyramid_dim: int = PYRAMID_DIM,
        pyramid_depth: int = 0,
        img_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, img_size, **kwargs)
        if pyramid_dim < 1:
            raise ValueError(f"pyramid_dim={pyramid_dim}: must be at least 1; published models use {PYRAMID_DIM}.")
        add_pyramid(self, config, pyramid_dim, pyramid_depth or default_depth(config), **kwargs)

    def levels(self, x16_BNE: Tensor, stem: StemFeatures) -> Levels:
        """Pyramid levels of stage-3 tokens and stem laterals (any subset of patches)."""
        return pyramid_levels(self, x16_BNE, stem)

    def export_backbone_state(self) -> dict[str, Tensor]:
        """Weights of `build_backbone(config)`, which loads them strictly; left out: names in `PRETRAINING_ONLY`."""
        # the `norm` of the iTPN flavours belongs to their fusion head, Fast-iTPN's is the final norm of stage 3
        only = PRETRAINING_ONLY if self.config.is_fast else (*PRETRAINING_ONLY, "norm.")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(only)}


def add_pyramid(owner: Any, config: ModelConfig, dim: int, depth: int, **kwargs: Any) -> None:
    """Registers the pyramid's modules on `owner` under their published top-level names."""
    stage1, stage2, stage3 = config.widths
    split: type[nn.Module] = ConvSplit if config.is_fast else LinearSplit

    def align(width: int, bias: bool) -> nn.Module:
        return CellConv(width, dim, **kwargs) if config.is_fast else nn.Linear(width, dim, bias=bias, **kwargs)

    def blocks() -> nn.Sequential:
        return nn.Sequential(*(_block(config, dim, **kwargs) for _ in range(depth)))

    owner.pyramid_dim = dim
    owner.align_dim_16tofpn = align(stage3, bias=True)
    owner.fpn_modules = nn.ModuleList(_block(config, dim, **kwargs) for _ in range(3))
    owner.align_dim_16to8 = align(stage2, bias=False)
    owner.split_16to8 = split(stage3, dim, **kwargs)
    owner.block_16to8 = blocks()
    owner.align_dim_8to4 = align(stage1, bias=False)
    owner.split_8to4 = split(dim, dim, **kwargs)
    owner.block_8to4 = blocks()


def pyramid_levels(owner: Any, x16_BNE: Tensor, stem: StemFeatures) -> Levels:
    """P4 from the tokens, P3 and P2 by splitting and adding the aligned laterals, one more MLP block each."""
    x16_BNSE = x16_BNE.unsqueeze(2)
    p16 = owner.align_dim_16tofpn(x16_BNSE)
    p8 = owner.block_16to8(owner.split_16to8(x16_BNSE) + owner.align_dim_16to8(stem.f8))
    p4 = owner.block_8to4(owner.split_8to4(p8) + owner.align_dim_8to4(stem.f4))
    return Levels(*(module(level) for module, level in zip(owner.fpn_modules, (p16, p8, p4), strict=True)))
