"""The CLIP-supervised iTPN pre-training student: mask after stage 2, pyramid head and auxiliary head."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from itpn_core.models.config import ModelConfig
from itpn_core.models.init import init_itpn
from itpn_core.models.layers import Block, attention_block, layer_norm
from itpn_core.models.layout import row_major
from itpn_core.models.pyramid import PYRAMID_DIM, Levels, PyramidTrunk
from itpn_core.models.trunk import StemFeatures

_AUX_BLOCKS = 2
_AUX_DEPTH = 0.75
# the published auxiliary blocks keep torch's default; every other norm has 1e-6 (fixed by the golden case)
_AUX_EPS = 1e-5


class ClipFeatures(NamedTuple):
    """Pyramid levels, and the auxiliary branch [B, N, E] before its norm."""

    levels: Levels
    aux: Tensor


def cell_projections(dim: int, embed_dim: int, **kwargs: Any) -> nn.ModuleList:
    """Per level LN and Linear from each cell to E, E/4 or E/16, so that every patch yields E numbers."""
    return nn.ModuleList(
        nn.Sequential(layer_norm(dim, **kwargs), nn.Linear(dim, embed_dim // cells, **kwargs)) for cells in (1, 4, 16)
    )


def fuse_cells(projections: nn.ModuleList, levels: Levels) -> list[Tensor]:
    """Projects the cells of every level and joins those of a patch in row-major order: three tensors [B, N, E]."""
    return [row_major(project(level)).flatten(2) for project, level in zip(projections, levels, strict=True)]


class ClipStudent(PyramidTrunk):
    """iTPN in CLIP-supervised pre-training.

    All patches pass stages 1 and 2; then the mask token replaces the tokens of masked patches. The published code lets
    the stage-1 and stage-2 laterals of masked patches reach the pyramid head un-masked, which leaks the answer: that is
    the faithful default. `mask_laterals` replaces them by zero and closes the leak (ours).

    Args:
        config: shape of the model; `family` must be "itpn_clip", embed_dim a multiple of 16.
        target_dim: width T of the teacher's features.
        pyramid_dim: width of the pyramid levels.
        pyramid_depth: MLP blocks per level; 0 takes the family's.
        mask_laterals: hide the laterals of masked patches from the pyramid.
        img_size: (height, width) when not the config's square.
        kwargs: device and dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        target_dim: int,
        pyramid_dim: int = PYRAMID_DIM,
        pyramid_depth: int = 0,
        *,
        mask_laterals: bool = False,
        img_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if config.family != "itpn_clip":
            raise ValueError(f"ClipStudent needs family='itpn_clip', got {config.family!r}.")
        if config.embed_dim % 16:
            raise ValueError(
                f"embed_dim={config.embed_dim}: the fusion head splits it over 16 cells; use a multiple of 16."
            )
        super().__init__(config, pyramid_dim, pyramid_depth, img_size, **kwargs)
        width = config.embed_dim
        self.mask_laterals = mask_laterals
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width, **kwargs))
        self.decoder_embed = cell_projections(pyramid_dim, width, **kwargs)
        self.norm = layer_norm(width, **kwargs)
        self.lm_head = nn.Linear(width, target_dim, **kwargs)
        self.cls_pt_layers = nn.ModuleList(
            attention_block(config, self.grid, eps=_AUX_EPS, **kwargs) for _ in range(_AUX_BLOCKS)
        )
        self.norm_cls = layer_norm(width, **kwargs)
        self.lm_cls_head = nn.Linear(width, target_dim, **kwargs)
        init_itpn(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def _laterals(self, stem: StemFeatures, mask_BN: Tensor) -> StemFeatures:
        if not self.mask_laterals:
            return stem
        hidden = mask_BN[:, :, None, None]
        return stem._replace(f4=stem.f4.masked_fill(hidden, 0.0), f8=stem.f8.masked_fill(hidden, 0.0))

    def encode(self, images_B3HW: Tensor, mask_BN: Tensor, drop_keys_B: Tensor | None = None) -> ClipFeatures:
        """Pyramid levels and the auxiliary branch."""
        grid = self.grid_of(*images_B3HW.shape[-2:])
        keep_BP = self.drop_path_factors(images_B3HW.shape[0], images_B3HW.device, drop_keys_B)
        stem = self.stem(self.embed(images_B3HW), keep_BP)
        tokens_BNE = torch.where(mask_BN[:, :, None], self.mask_token.to(stem.tokens.dtype), stem.tokens)
        tap = int(_AUX_DEPTH * self.config.depths[2])
        attended = self.attend(tokens_BNE + self.positions(grid), grid, keep_BP, (tap,), masked_BN=mask_BN)
        aux_BNE = attended.taps[0]
        for index, module in enumerate(self.cls_pt_layers):
            block = cast("Block", module)
            aux_BNE = self._run(block, aux_BNE, self.attention_bias(block, grid, self.config.depths[2] + index), None)
        return ClipFeatures(self.levels(attended.tokens, self._laterals(stem, mask_BN)), aux_BNE)

    def heads(self, features: ClipFeatures) -> tuple[Tensor, Tensor]:
        """Predictions [B, N, T] of the pyramid head and of the auxiliary head."""
        p16, p8, p4 = fuse_cells(self.decoder_embed, features.levels)
        return self.lm_head(self.norm(p16 + p8 + p4)), self.lm_cls_head(self.norm_cls(features.aux))

    def forward(self, images_B3HW: Tensor, mask_BN: Tensor, drop_keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predicted teacher features of every patch, twice.

        Args:
            images_B3HW: normalised images.
            mask_BN: bool [B, N], True = masked.
            drop_keys_B: int64 [B] stochastic-depth keys; None draws from torch's generator.

        Returns:
            (lm_BNT, lm_cls_BNT): pyramid head and auxiliary head, row-major patch order.
        """
        return self.heads(self.encode(images_B3HW, mask_BN, drop_keys_B))
