"""Plans with their tensors on the right device, made once per settings, grid and device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from itpn_core.reduction.backend import measured_mask
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.gathering import View
from itpn_core.reduction.layout import Grid
from itpn_core.reduction.plan import Plan, make_plan, make_sparse_plan
from itpn_core.reduction.stage import make_views

# Detection feeds many sizes; more plans than this would only hold memory.
_CACHED_PLANS = 32


@dataclass(frozen=True)
class Setting:
    """What a plan is made for; hashable, so that a compiler can take the plan for a constant.

    Attributes:
        migration: which tokens go.
        gathering: how attention is restricted.
        depth: layers of stage 3.
        grid: (rows, columns).
        visible: tokens of a sparse sequence; 0 when all cells are there.
        heads: attention heads.
        head_width: their width.
        dtype: of the weights.
        device: where the tokens are.
    """

    migration: TokenMigration
    gathering: TokenGathering
    depth: int
    grid: Grid
    visible: int
    heads: int
    head_width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Prepared:
    """A plan and how the sequence is cut after each number of drops."""

    plan: Plan
    views: tuple[View, ...]


_cache: dict[Setting, Prepared] = {}


def prepare(setting: Setting) -> Prepared:
    """The plan of a setting, from the cache where possible.

    Raises:
        ConfigError: settings that do not fit the model or the grid.
    """
    found = _cache.get(setting)
    if found is None:
        # a plan made in inference mode must serve training later
        with torch.inference_mode(False):
            found = _prepare(setting)
        # tensors made while a graph is exported are not real and may not outlive it
        if type(found.plan.order.cells) is Tensor:
            while len(_cache) >= _CACHED_PLANS:
                _cache.pop(next(iter(_cache)))
            _cache[setting] = found
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant_prepare(
    migration: TokenMigration,
    gathering: TokenGathering,
    sizes: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Prepared:
    """`prepare` as a constant of the compiled graph.

    Args:
        migration: which tokens go.
        gathering: how attention is restricted.
        sizes: depth, rows, columns, visible, heads and head width.
        dtype: of the weights.
        device: where the tokens are.
    """
    depth, rows, cols, visible, heads, head_width = sizes
    return prepare(Setting(migration, gathering, depth, (rows, cols), visible, heads, head_width, dtype, device))


def _prepare(setting: Setting) -> Prepared:
    if setting.visible:
        plan = make_sparse_plan(setting.migration, setting.depth, setting.visible, setting.grid)
    else:
        plan = make_plan(setting.migration, setting.gathering, setting.depth, setting.grid)
    plan = _moved(plan, setting.device)
    views = make_views(plan, setting.gathering, setting.device)
    if plan.windowed:
        shape = (setting.heads, setting.head_width, setting.dtype, setting.device)
        views = tuple(replace(view, block_mask=measured_mask(view, *shape)) for view in views)
    return Prepared(plan, views)


def _moved(plan: Plan, device: torch.device) -> Plan:
    """The plan with the tensors that a forward pass reads on a device."""
    order = replace(plan.order, cells=plan.order.cells.to(device), slots=plan.order.slots.to(device))
    means = None if plan.means is None else plan.means.to(device)
    return replace(plan, order=order, means=means)
