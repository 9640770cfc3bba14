"""The Fast-iTPN pre-training student: mask at the patch embedding, pyramid, fusion head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from itpn_core.models.config import ModelConfig
from itpn_core.models.init import init_fast
from itpn_core.models.layers import CellConv, layer_norm
from itpn_core.models.layout import cell_order, take_patches, to_map
from itpn_core.models.pyramid import PYRAMID_DIM, Levels, Pyramid, PyramidTrunk
from itpn_core.models.trunk import StemFeatures

# The published recipe scales the gradient that reaches the patch embedding.
STEM_GRADIENT_SCALE = 0.1


class FastStudent(PyramidTrunk):
    """Fast-iTPN in pre-training (REFERENCE order: stem, mask, stages, norm, pyramid, fusion, the same norm, head).

    Args:
        config: shape of the model; `family` must be "fast".
        target_dim: width T of the teacher's features.
        pyramid_dim: width of the pyramid levels.
        stem_gradient_scale: factor on the gradient that reaches the patch embedding (1 switches it off).
        img_size: (height, width) when not the config's square.
        kwargs: device and dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        target_dim: int,
        pyramid_dim: int = PYRAMID_DIM,
        *,
        stem_gradient_scale: float = STEM_GRADIENT_SCALE,
        img_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if not config.is_fast:
            raise ValueError(
                f"FastStudent needs family='fast', got {config.family!r}: use ClipStudent or PixelStudent."
            )
        super().__init__(config, pyramid_dim, img_size=img_size, **kwargs)
        width = config.embed_dim
        self.stem_gradient_scale = stem_gradient_scale
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4 * width, **kwargs))
        self.decoder_embed = nn.ModuleList(
            nn.Sequential(layer_norm(pyramid_dim, **kwargs), CellConv(pyramid_dim, width, side, **kwargs))
            for side in (1, 2, 4)
        )
        self.norm = layer_norm(width, **kwargs)
        self.lm_head = nn.Linear(width, target_dim, **kwargs)
        init_fast(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def masked_cells(self, images_B3HW: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Embedded cells [B, N, 16, E/4]; all 16 cells of a masked patch become the mask token's."""
        cells_BNSC = self.embed(images_B3HW)
        if self.stem_gradient_scale != 1.0:
            # exact in the forward pass, as the difference is zero
            cells_BNSC = torch.lerp(cells_BNSC.detach(), cells_BNSC, self.stem_gradient_scale)
        if mask_BN is None:
            return cells_BNSC
        # the token is stored channel-major: index = channel * 16 + row * 4 + column
        token_SC = cell_order(self.mask_token.view(-1, 16).t()).to(cells_BNSC.dtype)
        return torch.where(mask_BN[:, :, None, None], token_SC, cells_BNSC)

    def encode(
        self,
        images_B3HW: Tensor,
        mask_BN: Tensor | None = None,
        drop_keys_B: Tensor | None = None,
        only_BM: Tensor | None = None,
    ) -> tuple[Tensor, StemFeatures, Levels]:
        """Normed stage-3 tokens [B, N, E], stem laterals, and pyramid levels of all patches or of `only_BM`."""
        grid = self.grid_of(*images_B3HW.shape[-2:])
        keep_BP = self.drop_path_factors(images_B3HW.shape[0], images_B3HW.device, drop_keys_B)
        stem = self.stem(self.masked_cells(images_B3HW, mask_BN), keep_BP)
        x_BNE = self.norm(self.attend(stem.tokens + self.positions(grid), grid, keep_BP, masked_BN=mask_BN).tokens)
        return x_BNE, stem, self._levels_of(only_BM, x_BNE, stem)

    def _levels_of(self, only_BM: Tensor | None, x_BNE: Tensor, stem: StemFeatures) -> Levels:
        if only_BM is None:
            return self.levels(x_BNE, stem)
        # No patch of the pyramid sees another one: what no loss asks for need not be computed.
        f4, f8 = (take_patches(lateral, only_BM) for lateral in (stem.f4, stem.f8))
        return self.levels(take_patches(x_BNE, only_BM), stem._replace(f4=f4, f8=f8))

    def head(self, levels: Levels) -> Tensor:
        """Fuses the levels and predicts teacher features [B, N, T]."""
        fused = [
            # concatenate all cells of a patch: the decoder's kernel covers them
            conv(norm(level).flatten(2))
            for (norm, conv), level in zip(cast("list[nn.Sequential]", self.decoder_embed), levels, strict=True)
        ]
        out: Tensor = self.lm_head(self.norm(fused[0] + fused[1] + fused[2]))
        return out

    def forward(
        self,
        images_B3HW: Tensor,
        mask_BN: Tensor | None = None,
        drop_keys_B: Tensor | None = None,
        only_BM: Tensor | None = None,
    ) -> Tensor:
        """Predicted teacher features of every patch, or of some.

        Args:
            images_B3HW: normalised images.
            mask_BN: bool [B, N], True = masked; None masks nothing.
            drop_keys_B: int64 [B] stochastic-depth keys; None draws from torch's generator.
            only_BM: int64 [B, M], the patches to predict; None = all.

        Returns:
            [B, N, T] in row-major patch order, or [B, M, T] in the order of `only_BM`.
        """
        _, _, levels = self.encode(images_B3HW, mask_BN, drop_keys_B, only_BM)
        return self.head(levels)

    def pyramid(self, images_B3HW: Tensor, mask_BN: Tensor | None = None, drop_keys_B: Tensor | None = None) -> Pyramid:
        """Stage-3 map and the outputs of `fpn_modules` as maps [B, C, H, W]."""
        x_BNE, _, levels = self.encode(images_B3HW, mask_BN, drop_keys_B)
        grid = self.grid_of(*images_B3HW.shape[-2:])
        return Pyramid(to_map(x_BNE, grid), *(to_map(level, grid) for level in levels))
