"""Stage 3 under a reduction: the one place where migration, gathering and the model's blocks meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itpn_core.random import derive
from itpn_core.reduction import migration as move
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.gathering import View, gathered_layer, global_layer, zero_shot_tokens
from itpn_core.reduction.layout import from_windows, to_windows
from itpn_core.reduction.plan import Drop, Plan, refuse_merge
from itpn_core.reduction.rows import take

if TYPE_CHECKING:
    from itpn_core.models.layers import Block

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a forward pass brings besides its tokens; all optional.

    Attributes:
        keep: stochastic-depth factors of each layer's two branches [B, layers, 2].
        masked: bool [B, N], tokens that stand for masked patches: never compared, dropped or merged.
        sparse_cells: int64 [B, N], cells of a sparse sequence; None when all cells of the grid are there in order.
        gathering_tokens: trained ones [G, E].
    """

    keep: Tensor | None = None
    masked: Tensor | None = None
    sparse_cells: Tensor | None = None
    gathering_tokens: Tensor | None = None


@dataclass(frozen=True)
class StageOutput:
    """What stage 3 returns.

    Attributes:
        tokens: restored grid [B, N, E], row-major.
        taps: restored grids after the tapped layers.
        survivors: bool [B, N], cells whose token was never dropped (or merged away); None when nothing was reduced.
        history: (layer, cells int64 [B, n] of the tokens left before it) of every drop; pads of windows say -1.
    """

    tokens: Tensor
    taps: list[Tensor]
    survivors: Tensor | None
    history: tuple[tuple[int, Tensor], ...] = ()


class ReducedStage:
    """One pass through stage 3.

    Args:
        plan: counts and orders for the grid at hand.
        views: how the sequence is cut after each number of drops (`make_views`).
        migration: which tokens go.
        gathering: how attention is restricted.
        inputs: masks, keys, factors and trained tokens.
        bias_table: (block index) -> relative-bias table [R, heads] of this grid, or None.
        call: runs a block function, possibly recomputing it in the backward pass.
    """

    def __init__(
        self,
        plan: Plan,
        views: tuple[View, ...],
        migration: TokenMigration,
        gathering: TokenGathering,
        inputs: Inputs,
        bias_table: Callable[[int], Tensor | None],
        call: Call,
    ) -> None:
        if inputs.masked is not None:
            refuse_merge(migration)
        self.plan, self.views, self.migration, self.gathering = plan, views, migration, gathering
        self.inputs, self.bias_table, self.call = inputs, bias_table, call
        self.view = views[0]
        self.keys_B: Tensor
        self.slot_BS: Tensor | None = None
        self.parked_BSE: Tensor | None = None
        self.owner_BS: Tensor | None = None
        self.size_BS: Tensor | None = None
        self.carried: list[move.Carry] = []
        self.history: list[tuple[int, Tensor]] = []

    def run(self, blocks: list[Block], x_BNE: Tensor, taps: tuple[int, ...] = ()) -> StageOutput:
        """All layers; the returned grids are row-major and hold every token exactly once."""
        z = self.enter(x_BNE)
        tapped = []
        for index, block in enumerate(blocks):
            for drop in self.plan.drops:
                if drop.layer == index:
                    z = self.drop(drop, block, z)
            keep_B2 = None if self.inputs.keep is None else self.inputs.keep[:, index]
            z = self.layer(index, block, z, keep_B2)
            if index in taps:
                tapped.append(self.full_grid(z))
        return StageOutput(self.full_grid(z), tapped, self.survivors(z), tuple(self.history))

    # --- sequence ---

    def enter(self, x_BNE: Tensor) -> Tensor:
        """Window-major order, gathering tokens in front."""
        if self.migration.rule == "random":
            self.keys_B = move.content_keys(x_BNE)
        x_BSE = to_windows(x_BNE, self.plan.order)
        if self.plan.means is None:
            return x_BSE
        trained_GE = self.inputs.gathering_tokens
        if trained_GE is None:
            return torch.cat([zero_shot_tokens(x_BSE, self.plan.means), x_BSE], 1)
        repeats = self.plan.gathering_tokens // len(trained_GE)
        g_BTE = trained_GE.to(x_BSE.dtype).repeat(repeats, 1).expand(x_BSE.shape[0], -1, -1)
        return torch.cat([g_BTE, x_BSE], 1)

    def slots(self, z_BTE: Tensor) -> Tensor:
        """Slots of the current tokens, int64 [B, S']."""
        if self.slot_BS is not None:
            return self.slot_BS
        count = z_BTE.shape[1] - self.plan.gathering_tokens
        return torch.arange(count, device=z_BTE.device).expand(z_BTE.shape[0], -1)

    def cells(self, z_BTE: Tensor) -> Tensor:
        """Original cells of the current tokens, int64 [B, S']; pads say 0."""
        slot_BS = self.slots(z_BTE)
        if self.inputs.sparse_cells is not None:
            return self.inputs.sparse_cells.gather(1, slot_BS)
        return self.plan.order.cells.to(z_BTE.device)[slot_BS]

    def full_grid(self, z_BTE: Tensor) -> Tensor:
        """Survivors and parked tokens, every cell once, row-major [B, N, E]."""
        x_BSE = z_BTE[:, self.plan.gathering_tokens :]
        grid_BSE = move.carry(move.restore(self.parked_BSE, x_BSE, self.slot_BS), self.carried)
        if self.owner_BS is not None:
            grid_BSE = take(grid_BSE, self.owner_BS)
        return from_windows(grid_BSE, self.plan.order)

    def survivors(self, z_BTE: Tensor) -> Tensor:
        """Which cells' tokens were never dropped: bool [B, N]."""
        slot_BS = self.slots(z_BTE)
        total = self.plan.order.windows * self.plan.order.length
        alive_BS = torch.zeros(z_BTE.shape[0], total, dtype=torch.bool, device=z_BTE.device).scatter(1, slot_BS, True)
        return alive_BS if self.plan.order.identity else alive_BS[:, self.plan.order.slots.to(z_BTE.device)]

    # --- dropping ---

    def drop(self, drop: Drop, block: Block, z_BTE: Tensor) -> Tensor:
        """Parks all tokens and keeps the survivors of one drop."""
        front = self.plan.gathering_tokens
        x_BSE, slot_BS = z_BTE[:, front:], self.slots(z_BTE)
        with torch.no_grad():
            score_BS, partner_BS = self.score(drop, block, z_BTE)
            stay, go = move.select(score_BS, self.plan.order.windows, drop.per_window)
        if partner_BS is not None:
            x_BSE = self.merge(x_BSE, slot_BS, go, partner_BS, stay)
        elif self.migration.replenish:
            self.parked_BSE = move.park(self.parked_BSE, x_BSE, self.slot_BS)
            if self.migration.carries:
                self.remember(block, z_BTE, stay, go)
        elif self.parked_BSE is None:
            self.parked_BSE = torch.zeros_like(x_BSE)
        self.slot_BS = slot_BS.gather(1, stay)
        self.view = self.views[len(self.history) + 1]
        survivors = take(x_BSE, stay)
        z_BTE = torch.cat([z_BTE[:, :front], survivors], 1) if front else survivors
        cells, pads_BS = self.cells(z_BTE), self.pads(z_BTE.shape[0])
        self.history.append((drop.layer, cells if pads_BS is None else cells.masked_fill(pads_BS, -1)))
        return z_BTE

    def score(self, drop: Drop, block: Block, z_BTE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the current tokens (highest goes first), and partners when the rule merges."""
        x_BSE, rule = z_BTE[:, self.plan.gathering_tokens :], self.migration.rule
        pads_BS, cells = self.pads(x_BSE.shape[0]), self.cells(z_BTE)
        if rule == "random":
            keys_B = derive(self.keys_B + self.migration.seed, f"token_migration/{drop.layer}")
            return self.guarded(move.random_score(keys_B, x_BSE.shape[1]), cells, pads_BS), None
        features = self.features(block, x_BSE)
        if rule == "norm":
            return self.guarded(move.norm_score(features), cells, pads_BS), None
        colour = (cells // self.plan.grid[1] + cells % self.plan.grid[1]) % 2
        odd_set = self.inputs.masked is not None or self.inputs.sparse_cells is not None
        if self.migration.partners == "neighbours" and rule == "redundancy":
            usable = self.usable(cells, pads_BS)
            score_BS = move.redundancy_neighbours(features, cells, self.plan.grid, usable)
            return self.guarded(score_BS, cells, pads_BS), None
        if odd_set:
            score_BS = move.redundancy_pairs(features, colour, self.usable(cells, pads_BS))
            return self.guarded(score_BS, cells, pads_BS, colour == drop.colour), None
        droppable, partners = halves(colour, pads_BS, drop)
        if rule == "merge":
            return move.best_partner(features, droppable, partners)
        return move.redundancy_halves(features, droppable, partners), None

    def features(self, block: Block, x_BSE: Tensor) -> Tensor:
        """What tokens are compared by: [B, S', D]."""
        return block.attn.key(block.norm1(x_BSE)).mean(1) if self.migration.similarity == "keys" else x_BSE

    def remember(self, block: Block, z_BTE: Tensor, stay: Tensor, go: Tensor) -> None:
        """Notes the most similar survivor of each token that goes, and that survivor's value now."""
        x_BSE, slot_BS, cells = z_BTE[:, self.plan.gathering_tokens :], self.slots(z_BTE), self.cells(z_BTE)
        with torch.no_grad():
            features, pads_BS = self.features(block, x_BSE), self.pads(x_BSE.shape[0])
            partner_BK = move.nearest_survivor(features, go, stay, pads_BS, self.masked(cells))
        before_BKE = take(x_BSE, partner_BK)
        self.carried.append(move.Carry(slot_BS.gather(1, go), slot_BS.gather(1, partner_BK), before_BKE))

    def pads(self, batch: int) -> Tensor | None:
        """True in pad slots of the current sequence, bool [B, S']; None without pads."""
        valid_WL = self.view.valid
        return None if valid_WL is None else (~valid_WL).flatten().expand(batch, -1)

    def masked(self, cells_BS: Tensor) -> Tensor | None:
        """Which of the current tokens stand for masked patches; None without a mask."""
        mask_BN = self.inputs.masked
        return None if mask_BN is None else mask_BN.gather(1, cells_BS)

    def usable(self, cells_BS: Tensor, pads_BS: Tensor | None) -> Tensor:
        """Tokens that may be compared: no pads, no masked ones."""
        masked_BS = self.masked(cells_BS)
        usable_BS = torch.ones_like(cells_BS, dtype=torch.bool) if masked_BS is None else ~masked_BS
        return usable_BS if pads_BS is None else usable_BS & ~pads_BS

    def guarded(
        self, score_BS: Tensor, cells_BS: Tensor, pads_BS: Tensor | None, first_BS: Tensor | None = None
    ) -> Tensor:
        """Scores with pads kept for certain, and masked tokens behind all visible ones."""
        score_BS = move.tiered(score_BS, first_BS, self.masked(cells_BS))
        return score_BS if pads_BS is None else score_BS.masked_fill(pads_BS, move.KEEP)

    def merge(self, x_BSE: Tensor, slot_BS: Tensor, go: Tensor, partner_BS: Tensor, stay: Tensor) -> Tensor:
        """ToMe baseline: merges the tokens that go into their partners and remembers who owns every slot."""
        if self.size_BS is None or self.owner_BS is None:
            self.size_BS = torch.ones(slot_BS.shape, device=x_BSE.device)
            self.owner_BS = slot_BS
            # only the shape matters: every slot is read through its owner
            self.parked_BSE = x_BSE
        x_BSE, sizes = move.merge_into(x_BSE, self.size_BS, go, partner_BS)
        new_owner = torch.arange(self.owner_BS.shape[1], device=x_BSE.device).expand_as(self.owner_BS)
        new_owner = new_owner.scatter(1, slot_BS.gather(1, go), slot_BS.gather(1, partner_BS.gather(1, go)))
        self.owner_BS = new_owner.gather(1, self.owner_BS)
        self.size_BS = sizes.gather(1, stay)
        return x_BSE

    # --- layers ---

    def layer(self, index: int, block: Block, z_BTE: Tensor, keep_B2: Tensor | None) -> Tensor:
        """One block over the current sequence."""
        is_global = not self.plan.windowed or index in self.gathering.global_layers
        bias = self.bias(index, z_BTE, 1 if is_global else self.view.windows)
        if not is_global:
            return self.call(gathered_layer, block, z_BTE, self.view, bias, keep_B2)
        bias = None if bias is None else bias[:, 0]
        if self.plan.windowed or self.view.valid is not None:
            return self.call(global_layer, block, z_BTE, self.view, bias, keep_B2)
        return self.call(block, z_BTE, bias, keep_B2)

    def bias(self, index: int, z_BTE: Tensor, windows: int) -> Tensor | None:
        """Relative-position bias between the current tokens of each window: [B or 1, W or 1, heads, L, L]."""
        table_RH = self.bias_table(index)
        if table_RH is None:
            return None
        static = self.slot_BS is None and self.inputs.sparse_cells is None
        cells = self.cells(z_BTE[:1] if static else z_BTE)
        cols = self.plan.grid[1]
        # the code of a cell, so that the table's row of a pair is a difference of codes
        code_BWL = (cells // cols * (2 * cols - 1) + cells % cols).view(cells.shape[0], windows, -1)
        if static and windows > 1 and self.view.valid is None:
            code_BWL = code_BWL[:, :1]
        offset = (self.plan.grid[0] - 1) * (2 * cols - 1) + cols - 1
        row_BWLL = code_BWL[..., :, None] - code_BWL[..., None, :] + offset
        return table_RH.t().contiguous()[:, row_BWLL].permute(1, 2, 0, 3, 4)


def halves(colour_BS: Tensor, pads_BS: Tensor | None, drop: Drop) -> tuple[Tensor, Tensor]:
    """Places of droppable tokens and of their partners; both counts are the same in every image."""
    rank_BS = (colour_BS != drop.colour).to(torch.int8)
    if pads_BS is not None:
        rank_BS = rank_BS.masked_fill(pads_BS, 2)
    place_BS = rank_BS.argsort(dim=1, stable=True)
    return place_BS[:, : drop.droppable], place_BS[:, drop.droppable : drop.entering]


def make_views(plan: Plan, gathering: TokenGathering, device: torch.device) -> tuple[View, ...]:
    """How the sequence is cut before the first drop and after each one; masks live on `device`."""
    order = plan.order
    valid_WL = order.valid.view(order.windows, order.length).to(device) if order.padded else None
    first = View(
        order.windows, order.length, plan.gathering_tokens, gathering.per_window, gathering.simultaneous, valid_WL
    )
    views, lost = [first], 0
    for drop in plan.drops:
        lost += drop.per_window
        # pads stand last in a window, so losing valid tokens shifts the border of the pads
        valid = None if valid_WL is None else valid_WL[:, lost:]
        views.append(replace(first, length=order.length - lost, valid=valid))
    return tuple(views)
