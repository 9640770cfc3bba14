"""The pixel-supervised iTPN pre-training student: an encoder that computes visible patches only, and a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from itpn_core.models.clip_student import cell_projections, fuse_cells
from itpn_core.models.config import ITPN_MLP_RATIO, ModelConfig
from itpn_core.models.init import init_itpn
from itpn_core.models.layers import Block, FusedAttention, Mlp, layer_norm
from itpn_core.models.layout import patchify, take_patches
from itpn_core.models.positions import Grid, SizeCache, resample_positions, sincos_positions
from itpn_core.models.pyramid import PYRAMID_DIM, Levels, PyramidTrunk

DECODER_DIM = 512
DECODER_DEPTH = 8
DECODER_HEADS = 16


def ids_from_mask(mask_BN: Tensor, masked: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the visible patches, and where every patch stands in (visible, masked) order.

    Args:
        mask_BN: bool [B, N], True = masked, the same count in every row.
        masked: that count; None reads it from the mask, which waits for the device.

    Returns:
        (ids_keep_BK, ids_restore_BN), int64, both in row-major patch order.

    Raises:
        ValueError: when `masked` leaves no visible patch.
    """
    count = int(mask_BN[0].sum()) if masked is None else masked
    visible = mask_BN.shape[1] - count
    if not 0 < visible <= mask_BN.shape[1]:
        raise ValueError(f"{count} of {mask_BN.shape[1]} patches masked: at least one must stay visible.")
    order_BN = mask_BN.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BN[:, :visible], order_BN.argsort(dim=1)


class PixelStudent(PyramidTrunk):
    """iTPN in pixel-supervised (masked auto-encoder) pre-training.

    Args:
        config: shape of the model; `family` must be "itpn_pixel".
        pyramid_dim: width of the pyramid levels.
        pyramid_depth: MLP blocks per level; 0 takes the family's 2.
        decoder_dim: width of the decoder, a multiple of 16 and of `decoder_heads`.
        decoder_depth: decoder blocks.
        decoder_heads: decoder heads.
        img_size: (height, width) when not the config's square.
        kwargs: device and dtype.
    """

    computes_visible_only = True

    def __init__(
        self,
        config: ModelConfig,
        pyramid_dim: int = PYRAMID_DIM,
        pyramid_depth: int = 0,
        *,
        decoder_dim: int = DECODER_DIM,
        decoder_depth: int = DECODER_DEPTH,
        decoder_heads: int = DECODER_HEADS,
        img_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if config.family != "itpn_pixel":
            raise ValueError(f"PixelStudent needs family='itpn_pixel', got {config.family!r}.")
        if decoder_dim % 16 or decoder_dim % decoder_heads:
            raise ValueError(
                f"decoder_dim={decoder_dim}: must be a multiple of 16 and of decoder_heads={decoder_heads}."
            )
        super().__init__(config, pyramid_dim, pyramid_depth, img_size, **kwargs)
        pixels = config.in_chans * config.patch_size**2
        positions = torch.zeros(1, self.grid[0] * self.grid[1], decoder_dim, **kwargs)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim, **kwargs))
        # fixed, but kept as a parameter because published checkpoints list it among them
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self._decoder_positions, self._shifted_positions = SizeCache(), SizeCache()
        self.decoder_embed = cell_projections(pyramid_dim, decoder_dim, **kwargs)
        self.decoder_blocks = nn.ModuleList(
            _decoder_block(decoder_dim, decoder_heads, **kwargs) for _ in range(decoder_depth)
        )
        self.decoder_norm = layer_norm(decoder_dim, **kwargs)
        self.decoder_pred = nn.Linear(decoder_dim, pixels, **kwargs)
        init_itpn(self)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.decoder_pos_embed.copy_(sincos_positions(decoder_dim, self.grid))

    def encode(
        self, images_B3HW: Tensor, ids_keep_BK: Tensor, drop_keys_B: Tensor | None = None
    ) -> tuple[Tensor, Levels]:
        """Stage-3 tokens [B, K, E] and pyramid levels of the K visible patches; the others are never computed.

        Raises:
            ValueError: when the model has a relative position bias, which needs the full grid.
        """
        if self.config.has_relative_bias:
            raise ValueError(
                "relative_bias='on': the sparse pixel encoder has no full token grid; pre-train with 'auto'."
            )
        grid = self.grid_of(*images_B3HW.shape[-2:])
        keep_BP = self.drop_path_factors(images_B3HW.shape[0], images_B3HW.device, drop_keys_B)
        pixels_BKSP = take_patches(patchify(images_B3HW, self.config.patch_size), ids_keep_BK)
        stem = self.stem(self.patch_embed(pixels_BKSP), keep_BP)
        positions_BKE = self._encoder_positions(grid, ids_keep_BK.shape[1])[0][ids_keep_BK]
        x_BKE = self.attend(stem.tokens + positions_BKE, grid, keep_BP, cell_BN=ids_keep_BK).tokens
        return x_BKE, self.levels(x_BKE, stem)

    def decode(self, levels: Levels, ids_restore_BN: Tensor, grid: Grid) -> Tensor:
        """Pixels [B, N, patch * patch * channels] of every patch from the visible patches' levels.

        The mask token stands for a hidden patch at each of the three levels, so it counts three times in the sum.
        """
        p16, p8, p4 = fuse_cells(self.decoder_embed, levels)
        visible_BKD = p16 + p8 + p4
        hidden = ids_restore_BN.shape[1] - visible_BKD.shape[1]
        tokens_BMD = (len(levels) * self.mask_token).to(visible_BKD.dtype).expand(visible_BKD.shape[0], hidden, -1)
        x_BND = take_patches(torch.cat([visible_BKD, tokens_BMD], 1), ids_restore_BN)
        x_BND = x_BND + self._positions_for(grid)
        for block in self.decoder_blocks:
            x_BND = self._run(block, x_BND)
        out: Tensor = self.decoder_pred(self.decoder_norm(x_BND))
        return out

    def _encoder_positions(self, grid: Grid, visible: int) -> Tensor:
        """Positions [1, N, E]: the published code compares the number of visible patches with the table.

        So it interpolates whenever a patch is hidden, also at the trained size, where the offset of 0.1 cells moves
        every value a little on a CPU (CUDA's kernel copies there). The golden cases hold the moved values: so do we, on
        every device.
        """
        parameter = self.get_parameter(self.position_name)
        if visible == grid[0] * grid[1]:
            return self.positions(grid)
        cached = self._shifted_positions.get
        return cached(parameter, grid, lambda: resample_positions(parameter, self.grid, grid, always=True))

    def _positions_for(self, grid: Grid) -> Tensor:
        parameter = self.decoder_pos_embed
        return self._decoder_positions.get(parameter, grid, lambda: resample_positions(parameter, self.grid, grid))

    def forward(
        self,
        images_B3HW: Tensor,
        mask_BN: Tensor | None = None,
        drop_keys_B: Tensor | None = None,
        *,
        ids: tuple[Tensor, Tensor] | None = None,
        masked: int | None = None,
    ) -> Tensor:
        """Predicted pixels of every patch.

        Args:
            images_B3HW: normalised images.
            mask_BN: bool [B, N], True = masked, the same count in every row; not needed when `ids` is given.
            drop_keys_B: int64 [B] stochastic-depth keys; None draws from torch's generator.
            ids: (ids_keep_BK, ids_restore_BN) instead of a mask.
            masked: masked patches per image; without it the count is read from the mask (one device wait).

        Returns:
            [B, N, patch * patch * channels], each patch ordered (row, column, channel).
        """
        if ids is None:
            if mask_BN is None:
                raise ValueError("PixelStudent needs mask_BN or ids=(ids_keep_BK, ids_restore_BN); both are None.")
            ids = ids_from_mask(mask_BN, masked)
        _, levels = self.encode(images_B3HW, ids[0], drop_keys_B)
        return self.decode(levels, ids[1], self.grid_of(*images_B3HW.shape[-2:]))


def _decoder_block(width: int, heads: int, **kwargs: Any) -> Block:
    attn = FusedAttention(width, heads, **kwargs)
    return Block(width, attn, Mlp(width, ITPN_MLP_RATIO * width, **kwargs), **kwargs)


def patch_pixels(images_B3HW: Tensor, patch_size: int) -> Tensor:
    """Pixels of every patch [B, N, patch * patch * channels], ordered (row, column, channel) like the prediction."""
    batch, channels, height, width = images_B3HW.shape
    rows, cols = height // patch_size, width // patch_size
    split = images_B3HW.reshape(batch, channels, rows, patch_size, cols, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, patch_size**2 * channels)
