"""Everything about a reduction that depends only on settings, depth and grid: counts, colours, orders, masks.

A plan is made once per grid and holds no image: every shape in stage 3 follows from it, so batches never cause a
recompilation. It is also where settings that do not fit a model are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from itpn_core.errors import ConfigError
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.layout import Grid, WindowOrder, run_means, window_order

MULTIPLE = 8


@dataclass(frozen=True)
class Drop:
    """One drop of a schedule.

    Attributes:
        layer: stage-3 layer before which it happens.
        entering: tokens that enter (pads not counted).
        kept: tokens that stay.
        per_window: tokens that each window loses.
        length: slots of each window that enter, pads included.
        colour: droppable checkerboard colour, (row + column) mod 2.
        droppable: tokens of that colour that enter.
    """

    layer: int
    entering: int
    kept: int
    per_window: int
    length: int
    colour: int
    droppable: int


@dataclass(frozen=True)
class Plan:
    """A reduction made concrete for one grid; see `make_plan`.

    Attributes:
        grid: (rows, columns) of the cells.
        order: slots of the sequence in window-major order (a sparse sequence is one window of its own length).
        drops: drops that change something, in layer order.
        windowed: whether attention is restricted to windows anywhere.
        gathering_tokens: tokens T in front of the sequence (G, or windows * G).
        means: averaging weights of the zero-shot start, None without gathering tokens.
    """

    grid: Grid
    order: WindowOrder
    drops: tuple[Drop, ...]
    windowed: bool
    gathering_tokens: int
    means: Tensor | None


def kept_tokens(entering: int, ratio: float) -> int:
    """Tokens that stay: `8 * ceil(ratio * entering / 8)`, at most all."""
    return min(entering, MULTIPLE * math.ceil(ratio * entering / MULTIPLE))


def make_plan(migration: TokenMigration, gathering: TokenGathering, depth: int, grid: Grid) -> Plan:
    """Makes settings concrete for a model and a grid.

    Args:
        migration: which tokens to drop where.
        gathering: how attention is restricted; a window wider than the grid is clipped to it here.
        depth: layers of stage 3.
        grid: (rows, columns) of stage-3 tokens.

    Raises:
        ConfigError: a layer out of range, a ratio that this grid and window cannot keep, too many gathering tokens.
    """
    check_layers("TokenMigration.layers", migration.layers, depth)
    check_layers("TokenGathering.global_layers", gathering.global_layers, depth)
    order = window_order(grid, gathering.window)
    colour_S = torch.where(order.valid, (order.cells // grid[1] + order.cells % grid[1]) % 2, -1)
    tokens = gathering.tokens if gathering.active else 0
    left_WC = torch.stack([(colour_S.view(order.windows, -1) == colour).sum(1) for colour in (0, 1)], 1).tolist()
    return Plan(
        grid=grid,
        order=order,
        drops=_schedule(migration, order, left_WC, two_sided=migration.two_sided),
        # no gathering tokens and one window: this is global attention, by the very same code
        windowed=gathering.active and (order.windows > 1 or tokens > 0),
        gathering_tokens=tokens * (order.windows if gathering.per_window else 1),
        means=_means(order, gathering, tokens) if tokens else None,
    )


def check_layers(where: str, layers: tuple[int, ...], depth: int) -> None:
    """Refuses layer indices that a stage 3 of `depth` layers does not have."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise ConfigError(where, layers, f"{layer} must lie in 0 to {depth - 1}, the layers of stage 3")


def check_window(gathering: TokenGathering, grid: Grid) -> None:
    """Refuses a window larger than the grid a model is built for (at other sizes it is clipped)."""
    if gathering.window > max(grid):
        raise ConfigError(
            "TokenGathering.window",
            gathering.window,
            f"must lie in 1 to {max(grid)}, the longer side of the {grid[0]}x{grid[1]} grid (0 = global attention)",
        )


def _means(order: WindowOrder, gathering: TokenGathering, tokens: int) -> Tensor:
    cells_W = order.valid.view(order.windows, -1).sum(1)
    most = int(cells_W.min()) if gathering.per_window else int(cells_W.sum())
    if tokens > most:
        where = (
            f"the smallest window of the {order.grid[0]}x{order.grid[1]} grid" if gathering.per_window else "the grid"
        )
        raise ConfigError("TokenGathering.tokens", tokens, f"must lie in 0 to {most}, the cells of {where}")
    return run_means(order, tokens, gathering.per_window)


def make_sparse_plan(migration: TokenMigration, depth: int, count: int, grid: Grid) -> Plan:
    """A plan for a sequence that holds `count` cells of the grid, others in every image (pixel pre-training).

    Colours then differ in number over the batch; a drop takes its own colour first and fills up with the other.

    Args:
        migration: which tokens to drop where; rule "merge" is refused.
        depth: layers of stage 3.
        count: tokens in the sequence.
        grid: (rows, columns) that the tokens come from.
    """
    check_layers("TokenMigration.layers", migration.layers, depth)
    refuse_merge(migration)
    order = window_order((1, count), 0)
    return Plan(
        grid=grid,
        order=order,
        drops=_schedule(migration, order, [[count, 0]], two_sided=False),
        windowed=False,
        gathering_tokens=0,
        means=None,
    )


def refuse_merge(migration: TokenMigration) -> None:
    """Refuses the merging baseline where tokens are masked or missing: it has no place for either."""
    if migration.active and migration.rule == "merge":
        raise ConfigError("TokenMigration.rule", "merge", "must be redundancy, random or norm in masked pre-training")


def check_masked(plan: Plan, masked: int) -> None:
    """Refuses a schedule that would have to drop masked tokens.

    Args:
        plan: the plan of the grid at hand.
        masked: masked tokens of every image.
    """
    cells = plan.grid[0] * plan.grid[1]
    lost = sum(drop.entering - drop.kept for drop in plan.drops)
    if lost > cells - masked:
        least = masked / cells
        raise ConfigError(
            "TokenMigration.keep",
            [drop.kept / drop.entering for drop in plan.drops],
            f"drops {lost} tokens, but only {cells - masked} of {cells} are visible and masked tokens never go",
            f"Keep more than {least:.2f} of all tokens in total, or mask fewer.",
        )


def _schedule(
    migration: TokenMigration, order: WindowOrder, left_WC: list[list[int]], *, two_sided: bool
) -> tuple[Drop, ...]:
    """Counts of every drop; what is left of each colour in each window is static because all images drop alike."""
    length = order.length
    drops: list[Drop] = []
    for index, (layer, ratio) in enumerate(zip(migration.layers, migration.keep, strict=True)):
        colour = len(drops) % 2
        entering = sum(map(sum, left_WC))
        kept = kept_tokens(entering, ratio)
        room_W = [left[colour] if two_sided else sum(left) - 1 for left in left_WC]
        _check_ratio(f"TokenMigration.keep[{index}]", ratio, entering, kept, room_W, order)
        if kept == entering:
            continue
        if two_sided and not sum(left[1 - colour] for left in left_WC):
            _refuse_no_partners(index, ratio)
        lost = (entering - kept) // order.windows
        drops.append(Drop(layer, entering, kept, lost, length, colour, sum(left[colour] for left in left_WC)))
        length -= lost
        for left in left_WC:
            if two_sided:
                left[colour] -= lost
            else:
                # only the sum counts when either colour may go
                left[0], left[1] = sum(left) - lost, 0
    return tuple(drops)


def _refuse_no_partners(index: int, ratio: float) -> None:
    raise ConfigError(
        f"TokenMigration.keep[{index}]",
        ratio,
        "needs tokens of the other checkerboard colour to compare with, but the drop before took them all",
        "The nearest legal ratios here: 1 (keeps all); or keep more than half in the drop before, or use "
        "partners = 'neighbours'.",
    )


def _check_ratio(where: str, ratio: float, entering: int, kept: int, room_W: list[int], order: WindowOrder) -> None:
    windows, room = len(room_W), min(room_W)

    def legal(count: int) -> bool:
        return (entering - count) % windows == 0 and (entering - count) // windows <= room

    if legal(kept):
        return
    counts = sorted({*range(MULTIPLE, entering, MULTIPLE), entering})
    near = [
        max((c for c in counts if c < kept and legal(c)), default=0),
        min(c for c in counts if c > kept and legal(c)),
    ]
    ratios = [math.floor(1e4 * count / entering) / 1e4 for count in near if count]
    reason = f"drops {entering - kept} of {entering} tokens"
    if windows > 1:
        reason += f", but each of {windows} windows ({order.window[0]}x{order.window[1]}) must lose the same number"
        reason += f" and at most {room}"
    else:
        reason += f", but only {room} of them may go in this drop"
    nearest = " and ".join(
        f"{value:g} (keeps {count})" for value, count in zip(ratios, filter(None, near), strict=True)
    )
    raise ConfigError(where, ratio, f"it {reason}", f"The nearest legal ratios here: {nearest}.")
