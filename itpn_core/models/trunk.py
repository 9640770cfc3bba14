"""The hierarchical trunk shared by the backbone and by every pre-training student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from itpn_core.models.config import ModelConfig
from itpn_core.models.layers import Block, PatchEmbed, attention_block, merge, stem_block
from itpn_core.models.layout import patchify
from itpn_core.models.positions import (
    Grid,
    SizeCache,
    bias_from_table,
    resample_bias_table,
    resample_positions,
    sincos_positions,
)
from itpn_core.random import uniform
from itpn_core.reduction.model import Reducible
from itpn_core.reduction.stage import StageOutput

# Larger attention biases are rebuilt at every use: at 1024 pixels one layer's would take 0.5 GB.
_CACHED_BIAS_TOKENS = 400


class StemFeatures(NamedTuple):
    """Features before attention.

    f4 [B, N, 16, E/4] and f8 [B, N, 4, E/2] are the outputs of stages 1 and 2 just before their merge; tokens [B, N, E]
    enter stage 3 (still without positions).
    """

    f4: Tensor
    f8: Tensor
    tokens: Tensor


class Trunk(Reducible):
    """Patch embedding, three stages, positions; parameters carry the published names at the top level.

    Args:
        config: shape of the model.
        img_size: (height, width) the position parameters are sized for; the config's square when None.
        kwargs: device and dtype.
    """

    def __init__(self, config: ModelConfig, img_size: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.grid: Grid = self.grid_of(*(img_size or (config.img_size, config.img_size)))
        self.position_name = "pos_embed" if config.is_fast else "absolute_pos_embed"
        count = self.grid[0] * self.grid[1]
        self.register_parameter(self.position_name, nn.Parameter(torch.zeros(1, count, config.embed_dim, **kwargs)))
        self.patch_embed = PatchEmbed(config, **kwargs)
        self.blocks = nn.ModuleList(self._make_blocks(**kwargs))
        self.grad_checkpointing = False
        # set on copies made by itpn_core.models.inference
        self.folded = False
        self._positions = SizeCache()
        # two more than stage 3 has blocks: the auxiliary branch of ClipStudent
        self._bias_tables = [SizeCache() for _ in range(config.depths[2] + 2)]
        self._biases = [SizeCache() for _ in range(config.depths[2] + 2)]
        # the plan is made of index tables that must exist also when the caller builds under torch.device("meta")
        with torch.device("cpu"):
            self.set_token_reduction(config.migration, config.gathering)

    def _make_blocks(self, **kwargs: Any) -> Iterable[nn.Module]:
        config = self.config
        for depth, width in zip(config.depths[:2], config.widths[:2], strict=True):
            yield from (stem_block(config, width, **kwargs) for _ in range(depth))
            yield merge(config, width, **kwargs)
        for _ in range(config.depths[2]):
            yield attention_block(config, self.grid, **kwargs)

    # --- sizes ---

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of stage-3 tokens for an image size.

        Raises:
            ValueError: when a side is not a positive multiple of the patch size.
        """
        patch = self.config.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"image size {height}x{width}: both sides must be positive multiples of the patch size {patch}; "
                f"pad or resize to {-(-height // patch) * patch}x{-(-width // patch) * patch}."
            )
        return height // patch, width // patch

    @property
    def stage3(self) -> list[Block]:
        """The attention blocks."""
        return cast("list[Block]", list(self.blocks)[self.config.stage_starts[2] :])

    # --- forward parts ---

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Images to stage-1 cells [B, N, 16, E/4] (layout: itpn_core.models.layout)."""
        cells_BNSC: Tensor = self.patch_embed(patchify(images_BCHW, self.config.patch_size))
        return cells_BNSC

    def stem(self, cells_BNSC: Tensor, keep_BP: Tensor | None = None) -> StemFeatures:
        """Stages 1 and 2 with their merges; works on any subset of patches because no position mixes.

        Args:
            cells_BNSC: embedded cells [B, N, 16, E/4].
            keep_BP: stochastic-depth factors from `drop_path_factors`, or None.
        """
        laterals = []
        x_BNSC, path = cells_BNSC, 0
        blocks, starts = list(self.blocks), self.config.stage_starts
        for start, end in pairwise(starts):
            for block in blocks[start : end - 1]:
                keep_B = None if keep_BP is None else keep_BP[:, path]
                x_BNSC = self._run(block, x_BNSC, keep_B)
                path += 1
            laterals.append(x_BNSC)
            x_BNSC = blocks[end - 1](x_BNSC)
        return StemFeatures(laterals[0], laterals[1], x_BNSC.squeeze(2))

    def positions(self, grid: Grid) -> Tensor:
        """Position embeddings [1, N, E] for a grid."""
        parameter = self.get_parameter(self.position_name)
        if grid == self.grid:
            return parameter
        return self._positions.get(parameter, grid, lambda: resample_positions(parameter, self.grid, grid))

    def attention_bias(self, block: Block, grid: Grid, index: int = 0) -> Tensor | None:
        """Bias [heads, N, N] of one stage-3 block, None where the model has none.

        Args:
            block: a block with or without a bias table.
            grid: token grid of the images at hand.
            index: which cache slot the block uses (its place in stage 3).
        """
        parameter = block.attn.relative_position_bias_table
        if parameter is None:
            return None

        def compute() -> Tensor:
            return bias_from_table(cast("Tensor", self.bias_table(block, grid, index)), grid)

        if grid[0] * grid[1] > _CACHED_BIAS_TOKENS:
            return compute()
        return self._biases[index].get(parameter, grid, compute)

    def bias_table(self, block: Block, grid: Grid, index: int = 0) -> Tensor | None:
        """Relative-bias table [(2*rows - 1) * (2*columns - 1), heads] of one block for a grid; None without bias."""
        table = block.attn.relative_position_bias_table
        if table is None or grid == self.grid:
            return table
        resample = self._bias_tables[index].get
        return resample(table, grid, lambda: resample_bias_table(table, self.grid, grid))

    def attend(
        self,
        x_BNE: Tensor,
        grid: Grid,
        keep_BP: Tensor | None = None,
        taps: tuple[int, ...] = (),
        *,
        masked_BN: Tensor | None = None,
        cell_BN: Tensor | None = None,
    ) -> StageOutput:
        """Stage 3: all attention blocks over tokens that already carry positions.

        Args:
            x_BNE: tokens of a full grid, or of `cell_BN`.
            grid: (rows, columns) of the image's tokens.
            keep_BP: stochastic-depth factors of the whole trunk, or None.
            taps: 0-based stage-3 blocks whose output is also wanted.
            masked_BN: bool [B, N], masked patches; token migration never compares or drops them.
            cell_BN: int64 [B, n], grid cells of the tokens when not all are there.

        Returns:
            Output of the last block, tapped outputs in block order, and what token migration did.
        """
        first, tapped = self.config.depths[0] + self.config.depths[1], []
        keep_BP2 = None if keep_BP is None else keep_BP[:, first:].reshape(len(keep_BP), -1, 2)
        if self.is_reduced:
            return self.reduced_stage(x_BNE, grid, keep_BP2=keep_BP2, taps=taps, masked_BN=masked_BN, cell_BN=cell_BN)
        for index, block in enumerate(self.stage3):
            keep_B2 = None if keep_BP2 is None else keep_BP2[:, index]
            x_BNE = self._run(block, x_BNE, self.attention_bias(block, grid, index), keep_B2)
            if index in taps:
                tapped.append(x_BNE)
        return StageOutput(x_BNE, tapped, None)

    def _run(self, block: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *args, use_reentrant=False)
        else:
            out = block(*args)
        return out

    # --- stochastic depth ---

    def drop_path_factors(self, batch: int, device: torch.device, drop_keys_B: Tensor | None = None) -> Tensor | None:
        """Factor of every residual branch for every sample: 0 (dropped) or 1 / (1 - rate).

        The rate rises linearly from 0 at the first block to `drop_path_rate` at the last; the two branches of a
        stage-3 block are dropped independently.

        Args:
            batch: samples B.
            device: where to draw.
            drop_keys_B: int64 [B], one key per sample that serves no other choice (`itpn_core.random.derive`); None
                draws from torch's generator.

        Returns:
            float32 [B, P], P = depth1 + depth2 + 2 * depth3; None in eval mode or at rate 0.
        """
        rate, depths = self.config.drop_path_rate, self.config.depths
        if not self.training or rate == 0.0:
            return None
        rates = torch.linspace(0.0, rate, sum(depths), device=device)
        stem = depths[0] + depths[1]
        rates_P = torch.cat([rates[:stem], rates[stem:].repeat_interleave(2, output_size=2 * depths[2])])
        if drop_keys_B is None:
            draws_BP = torch.rand(batch, rates_P.numel(), device=device)
        else:
            draws_BP = uniform(drop_keys_B.to(device), rates_P.numel())
        return (draws_BP >= rates_P).float() / (1.0 - rates_P)

    # --- initialisation ---

    def init_positions(self) -> None:
        """Position embeddings and bias tables as the published recipes start them."""
        parameter = self.get_parameter(self.position_name)
        if self.config.family == "itpn_pixel":
            with torch.no_grad():
                parameter.copy_(sincos_positions(self.config.embed_dim, self.grid))
        else:
            nn.init.trunc_normal_(parameter, std=0.02)
        for block in self.modules():
            if isinstance(block, Block) and block.attn.relative_position_bias_table is not None:
                nn.init.trunc_normal_(block.attn.relative_position_bias_table, std=0.02)
