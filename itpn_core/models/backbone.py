"""The backbone with timm's contract: classifier, dense features, resizing, parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from itpn_core.models.config import ModelConfig
from itpn_core.models.init import init_fast, init_head, init_itpn
from itpn_core.models.layers import Block, layer_norm
from itpn_core.models.layout import to_map
from itpn_core.models.positions import resample_bias_table, resample_positions
from itpn_core.models.pyramid import Levels, add_pyramid, default_depth, pyramid_levels
from itpn_core.models.trunk import StemFeatures, Trunk
from itpn_core.reduction.migration import mean_of
from itpn_core.reduction.model import GATHERING_TOKENS
from itpn_core.reduction.stage import StageOutput

FINAL_NORMS = ("tokens", "pooled")
_LEVELS = 4


class Backbone(Trunk):
    """iTPN or Fast-iTPN as a backbone and classifier.

    Args:
        config: shape of the model.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: "avg" (mean over tokens) or "" (none).
        final_norm: "tokens" norms every stage-3 token (pre-training's order; iTPN flavours, which have no such norm,
            get a parameter-free one); "pooled" norms the pooled vector with `fc_norm` (published classifiers).
        pyramid_dim: width of the feature pyramid; 0 builds none and dense features are the raw stages.
        pyramid_depth: MLP blocks per pyramid level; 0 takes the family's.
        drop_rate: dropout before the classifier.
        img_size: (height, width) when not the config's square.
        device: where to create parameters ("meta" works).
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_classes: int = 0,
        global_pool: str = "avg",
        final_norm: str = "tokens",
        pyramid_dim: int = 0,
        pyramid_depth: int = 0,
        drop_rate: float = 0.0,
        img_size: tuple[int, int] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kwargs = {"device": device, "dtype": dtype}
        super().__init__(config, img_size, **kwargs)
        if final_norm not in FINAL_NORMS:
            raise ValueError(f"final_norm={final_norm!r}: must be one of {', '.join(map(repr, FINAL_NORMS))}.")
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
        self.in_chans = config.in_chans
        self.norm: nn.Module = nn.Identity()
        self.fc_norm: nn.Module = nn.Identity()
        if pyramid_dim and config.is_fast and final_norm == "pooled":
            raise ValueError(
                "final_norm='pooled' with a pyramid: Fast-iTPN's pyramid reads normed tokens; use 'tokens'."
            )
        if final_norm == "pooled":
            self.fc_norm = layer_norm(config.embed_dim, **kwargs)
        else:
            self.norm = layer_norm(config.embed_dim, elementwise_affine=config.is_fast, **kwargs)
        self.pyramid_dim = 0
        if pyramid_dim:
            add_pyramid(self, config, pyramid_dim, pyramid_depth or default_depth(config), **kwargs)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = _make_head(config.embed_dim, num_classes, **kwargs)
        (init_fast if config.is_fast else init_itpn)(self)
        init_head(self.head)

    # --- features ---

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels and stride of every dense level, finest first (timm's format)."""
        patch, widths, starts = self.config.patch_size, self.config.widths, self.config.stage_starts
        widths_4 = (self.pyramid_dim,) * _LEVELS if self.pyramid_dim else (*widths, widths[2])
        last = (starts[1] - 2, starts[2] - 2, len(self.blocks) - 1, len(self.blocks) - 1)
        return [
            {"num_chs": width, "reduction": max(1, patch * 2**level // 4), "module": f"blocks.{block}"}
            for level, (width, block) in enumerate(zip(widths_4, last, strict=True))
        ]

    def attended(self, images_B3HW: Tensor, drop_keys_B: Tensor | None = None) -> tuple[StageOutput, StemFeatures]:
        """What stage 3 returns, tokens before any norm [B, N, E] and what was dropped, and the stem's laterals."""
        grid = self.grid_of(*images_B3HW.shape[-2:])
        keep_BP = self.drop_path_factors(images_B3HW.shape[0], images_B3HW.device, drop_keys_B)
        stem = self.stem(self.embed(images_B3HW), keep_BP)
        return self.attend(stem.tokens + self.positions(grid), grid, keep_BP), stem

    def encode(self, images_B3HW: Tensor, drop_keys_B: Tensor | None = None) -> tuple[Tensor, StemFeatures]:
        """Stage-3 tokens before any norm [B, N, E], and the stem's laterals."""
        out, stem = self.attended(images_B3HW, drop_keys_B)
        return out.tokens, stem

    def forward_features(self, images_B3HW: Tensor, drop_keys_B: Tensor | None = None) -> Tensor:
        """Stage-3 tokens [B, N, E] in row-major order, after the final norm (which `final_norm="pooled"` puts later).

        Args:
            images_B3HW: normalised images, sides divisible by the patch size.
            drop_keys_B: int64 [B] stochastic-depth keys; None draws from torch's generator.
        """
        out: Tensor = self.norm(self.encode(images_B3HW, drop_keys_B)[0])
        return out

    def forward_head(self, x_BNE: Tensor, pre_logits: bool = False, survivors_BN: Tensor | None = None) -> Tensor:
        """Pooling, norm, dropout and classifier; `pre_logits` stops before the classifier.

        Args:
            x_BNE: output of `forward_features`.
            pre_logits: return what the classifier would see.
            survivors_BN: bool [B, N], tokens to average; None averages all.
        """
        if self.global_pool == "avg":
            x_BNE = x_BNE.mean(1) if survivors_BN is None else mean_of(x_BNE, survivors_BN)
        x_BE = self.head_drop(self.fc_norm(x_BNE))
        out: Tensor = x_BE if pre_logits else self.head(x_BE)
        return out

    def forward(self, images_B3HW: Tensor, drop_keys_B: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes]; pooled features [B, E] without a classifier."""
        out, _ = self.attended(images_B3HW, drop_keys_B)
        survivors_BN = out.survivors if self.pools_survivors else None
        return self.forward_head(self.norm(out.tokens), survivors_BN=survivors_BN)

    def forward_levels(self, images_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Stage-3 tokens [B, N, E] before any norm, and three dense levels [B, N, S, C], finest first.

        The levels are the pyramid's where the model has one, otherwise the raw stages.
        """
        x_BNE, stem = self.encode(images_B3HW)
        if not self.pyramid_dim:
            return x_BNE, [stem.f4, stem.f8, x_BNE.unsqueeze(2)]
        levels = self.levels(x_BNE, stem)
        return x_BNE, [levels.p4, levels.p8, levels.p16]

    def levels(self, x_BNE: Tensor, stem: StemFeatures) -> Levels:
        """Pyramid levels; Fast-iTPN's pyramid reads normed tokens, iTPN's the raw ones."""
        return pyramid_levels(self, self.norm(x_BNE) if self.config.is_fast else x_BNE, stem)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Dense levels by index (0..3, finest first; 3 is a 2x2 average of level 2), as timm defines it.

        Args:
            x: images [B, C, H, W].
            indices: level indices, a count of last levels, or None for all.
            norm: also apply the final norm to raw stage-3 features.
            stop_early: leave out attention when only levels 0 and 1 of the raw stages are asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return only the list of levels.

        Returns:
            List of maps, or (output of `forward_features`, list of maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: must be 'NCHW' or 'NHWC'.")
        take, deepest = feature_take_indices(_LEVELS, indices)
        grid = self.grid_of(*x.shape[-2:])
        if stop_early and intermediates_only and deepest < 2 and not self.pyramid_dim:
            stem = self.stem(self.embed(x))
            tokens_BNE, levels = stem.tokens, [stem.f4, stem.f8]
        else:
            tokens_BNE, levels = self.forward_levels(x)
            if norm and not self.pyramid_dim:
                levels[2] = self.fc_norm(self.norm(levels[2]))
        maps = [to_map(level, grid) for level in levels]
        if deepest == 3:
            # odd maps keep their last row and column, and one-cell maps stay
            maps.append(F.avg_pool2d(maps[2], 2, 2, ceil_mode=True, count_include_pad=False))
        chosen = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in take]
        return chosen if intermediates_only else (self.norm(tokens_BNE), chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the chosen levels do not need; returns their indices."""
        take, deepest = feature_take_indices(_LEVELS, indices)
        if deepest < 2 and not self.pyramid_dim:
            self.blocks = nn.ModuleList(list(self.blocks)[: self.config.stage_starts[2]])
        if prune_norm and not self.pyramid_dim:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return list(take)

    # --- what timm tools ask for ---

    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **_: Any) -> None:
        """Replaces the classifier (0 removes it) and, if given, the pooling."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = _make_head(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
        init_head(self.head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimisers should not decay besides the one-dimensional ones."""
        tables = {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}
        return {self.position_name, GATHERING_TOKENS} | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regexes that group parameters by depth: a merge goes with the block before it, it is not a layer."""
        _, stage2, stage3 = self.config.stage_starts
        if coarse:
            spans = (range(stage2), range(stage2, stage3), range(stage3, len(self.blocks)))
            stages = [(rf"^blocks\.(?:{'|'.join(map(str, span))})\.", (index,)) for index, span in enumerate(spans)]
        else:
            stages, layer = [], 0
            for index in range(len(self.blocks)):
                if index in (stage2 - 1, stage3 - 1):
                    layer -= 1
                stages.append((rf"^blocks\.{index}\.", (layer,)))
                layer += 1
        return {
            "stem": rf"^{self.position_name}|^patch_embed|^mask_token|^{GATHERING_TOKENS}",
            "blocks": [*stages, (r"^norm|^fc_norm", (99999,)), (r"^align_|^split_|^block_|^fpn_", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every block in the backward pass when enabled."""
        self.grad_checkpointing = enable

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resizes position embeddings and bias tables to a new image size for good (they train at that size).

        Any other size still works at run time; this only saves the resampling.
        """
        if patch_size is not None and patch_size not in (self.config.patch_size, (self.config.patch_size,) * 2):
            raise ValueError(f"patch_size={patch_size}: this model's stem is built for {self.config.patch_size}.")
        if img_size is None:
            return
        new = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        with torch.no_grad():
            positions = self.get_parameter(self.position_name)
            resized = resample_positions(positions, self.grid, new).clone()
            setattr(self, self.position_name, nn.Parameter(resized, positions.requires_grad))
            for block in self.stage3:
                _resize_table(block, self.grid, new)
        self.grid = new
        for cache in (self._positions, *self._bias_tables, *self._biases):
            cache.clear()


def _resize_table(block: Block, old: tuple[int, int], new: tuple[int, int]) -> None:
    table = block.attn.relative_position_bias_table
    if table is not None:
        resized = resample_bias_table(table, old, new).clone()
        block.attn.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)


def _make_head(width: int, num_classes: int, **kwargs: Any) -> nn.Module:
    return nn.Linear(width, num_classes, **kwargs) if num_classes else nn.Identity()


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: must be 'avg' or '' (there is no class token).")


def build_backbone(config: ModelConfig, **kwargs: Any) -> Backbone:
    """The headless backbone of a config, with the final norm on tokens as in pre-training.

    Args:
        config: shape of the model.
        kwargs: further arguments of `Backbone` (num_classes, final_norm, pyramid_dim, device, ...).
    """
    return Backbone(config, **kwargs)
