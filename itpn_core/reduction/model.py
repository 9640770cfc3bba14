"""What makes a model reducible: settings that can be changed at any time without touching its weights."""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from itpn_core.errors import ConfigError
from itpn_core.reduction.config import TokenGathering, TokenMigration, as_gathering, as_migration
from itpn_core.reduction.layout import Grid
from itpn_core.reduction.plan import Plan, check_masked, check_window, make_plan, refuse_merge
from itpn_core.reduction.prepare import Prepared, constant_prepare
from itpn_core.reduction.stage import Inputs, ReducedStage, StageOutput

if TYPE_CHECKING:
    from itpn_core.models.trunk import Trunk

_log = logging.getLogger(__name__)
GATHERING_TOKENS = "gathering_tokens"


class Reducible(nn.Module):
    """Token migration and gathering for a trunk; a base class of `Trunk`, whose stage 3 it runs when settings ask."""

    # pixel pre-training never computes masked patches, so its stage 3 has no full grid
    computes_visible_only: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.migration = TokenMigration()
        self.gathering = TokenGathering()
        self.register_load_state_dict_pre_hook(_accept_gathering_tokens)  # type: ignore[no-untyped-call]

    def set_token_reduction(
        self,
        migration: TokenMigration | dict[str, Any] | None = None,
        gathering: TokenGathering | dict[str, Any] | None = None,
        *,
        masked_tokens: int = 0,
    ) -> None:
        """Switches token reduction on or off; no existing weight changes.

        Args:
            migration: which tokens to drop where; None switches it off.
            gathering: windows and gathering tokens; None switches them off. With `learn=True` the model gets a
                parameter `gathering_tokens` [G, E] (once; it stays when gathering is switched off).
            masked_tokens: masked tokens of every pre-training image, to refuse schedules that would have to drop them.

        Raises:
            ConfigError: a setting that this model or its grid cannot have; the model is then unchanged.
        """
        trunk = cast("Trunk", self)
        migration, gathering = as_migration(migration), as_gathering(gathering)
        check_window(gathering, trunk.grid)
        with torch.device("cpu"):  # its indices are needed here, also where a model is built on the meta device
            plan = make_plan(migration, gathering, trunk.config.depths[2], trunk.grid)
        if self.computes_visible_only:
            _check_sparse(migration, gathering, plan)
        else:
            check_masked(plan, masked_tokens)
        self._set_gathering_tokens(gathering, plan)
        self.migration, self.gathering = migration, gathering

    def _set_gathering_tokens(self, gathering: TokenGathering, plan: Plan) -> None:
        held = self.trained_gathering_tokens
        wanted = gathering.tokens if plan.gathering_tokens else 0
        if gathering.learn and wanted:
            if held is None:
                like = next(self.parameters())
                width = cast("Trunk", self).config.embed_dim
                tokens_GE = torch.empty(wanted, width, dtype=like.dtype, device=like.device)
                self.register_parameter(GATHERING_TOKENS, nn.Parameter(nn.init.trunc_normal_(tokens_GE, std=0.02)))
            elif len(held) != wanted:
                raise ConfigError("TokenGathering.tokens", wanted, f"this model already learns {len(held)}")
        elif wanted and gathering != self.gathering and (held is None or len(held) != wanted):
            _log.info(
                "token gathering: no %d trained gathering tokens in this model; zero-shot from pooled tokens", wanted
            )

    @property
    def trained_gathering_tokens(self) -> Tensor | None:
        """The parameter [G, E], None in a model that has none."""
        return self._parameters.get(GATHERING_TOKENS)

    @property
    def is_reduced(self) -> bool:
        """Whether any setting is on; a model that is not runs the plain code."""
        return self.migration.active or self.gathering.active

    @property
    def pools_survivors(self) -> bool:
        """Whether classification averages the undropped tokens only."""
        return self.migration.active and (self.migration.pool == "survivors" or not self.migration.replenish)

    def reduced_stage(
        self,
        x_BNE: Tensor,
        grid: Grid,
        *,
        keep_BP2: Tensor | None = None,
        taps: tuple[int, ...] = (),
        masked_BN: Tensor | None = None,
        cell_BN: Tensor | None = None,
    ) -> StageOutput:
        """Stage 3 under the current settings.

        Args:
            x_BNE: tokens with positions: all cells row-major, or those of `cell_BN`.
            grid: (rows, columns) of the image's tokens.
            keep_BP2: stochastic-depth factors [B, layers, 2], or None.
            taps: 0-based layers whose (restored) output is also wanted.
            masked_BN: bool [B, N], tokens that stand for masked patches.
            cell_BN: int64 [B, N], cells of a sparse sequence (pixel pre-training).

        Raises:
            ConfigError: settings that this grid or a sparse sequence cannot have.
        """
        trunk = cast("Trunk", self)
        blocks = trunk.stage3
        prepared = self._prepared(x_BNE, grid, sparse=cell_BN is not None)
        tokens_GE = self.trained_gathering_tokens
        if tokens_GE is not None and len(tokens_GE) != self.gathering.tokens:
            tokens_GE = None
        stage = ReducedStage(
            prepared.plan,
            prepared.views,
            self.migration,
            self.gathering,
            Inputs(keep_BP2, masked_BN, cell_BN, tokens_GE),
            lambda index: trunk.bias_table(blocks[index], grid, index),
            trunk._run,
        )
        return stage.run(blocks, x_BNE, taps)

    def _prepared(self, x_BNE: Tensor, grid: Grid, *, sparse: bool) -> Prepared:
        config = cast("Trunk", self).config
        heads = config.heads
        # index() turns a symbolic size of a graph being compiled into the number it stands for
        rows, cols, visible = operator.index(grid[0]), operator.index(grid[1]), operator.index(x_BNE.shape[1])
        sizes = (config.depths[2], rows, cols, visible if sparse else 0, heads, config.embed_dim // heads)
        prepared: Prepared = constant_prepare(self.migration, self.gathering, sizes, x_BNE.dtype, x_BNE.device)
        return prepared


def _check_sparse(migration: TokenMigration, gathering: TokenGathering, plan: Plan) -> None:
    refuse_merge(migration)
    if plan.windowed:
        raise ConfigError(
            "TokenGathering.window",
            gathering.window,
            "must be 0 when only visible patches are computed (pixel pre-training)",
            "Windows need the full grid: use migration alone, or another objective.",
        )


def _accept_gathering_tokens(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Lets a model that has no gathering tokens take those of a checkpoint."""
    saved = state_dict.get(prefix + GATHERING_TOKENS)
    if saved is not None and getattr(module, GATHERING_TOKENS, None) is None:
        like = next(module.parameters())
        tokens_GE = torch.empty(saved.shape, dtype=like.dtype, device=like.device)
        module.register_parameter(GATHERING_TOKENS, nn.Parameter(tokens_GE))
