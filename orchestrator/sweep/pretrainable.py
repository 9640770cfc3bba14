"""Whether masked pre-training could run with a setting: what a recommendation for `jobs/pretrain.py` must pass."""

from __future__ import annotations

import functools

from itpn_core.errors import ConfigError, UserError
from itpn_core.pretraining.base import mask_ratio
from itpn_core.pretraining.masking import mask_count
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.plan import check_masked, make_plan, refuse_merge
from orchestrator.config.tree import SweepJobConfig
from orchestrator.sweep.legal import with_fields
from orchestrator.sweep.space import Check, Setting


def pretrainable(config: SweepJobConfig, inner: Check) -> Check:
    """A `Space.check` that asks `inner` first, then whether the objective could train under the setting.

    Args:
        config: resolved configuration; its objective, at the size that is measured.
        inner: the check before this one.
    """
    side = config.data.image_size // config.model.patch_size
    masked = mask_count(side * side, mask_ratio(config.objective))
    sparse = config.objective.kind == "pixel"

    def refuse(setting: Setting) -> str:
        reason = inner(setting)
        if reason:
            return reason
        model = with_fields(config, setting.fields).model
        try:
            if sparse and model.gathering.active:
                raise ConfigError("model.gathering.window", model.gathering.window, "must be 0 in pixel pre-training")
            _check(model.migration, model.gathering, model.depths[2], side, 0 if sparse else masked)
        except UserError as error:
            return f"{error} (sweep.for_pretraining=false allows it)"
        return ""

    return refuse


@functools.lru_cache(maxsize=65536)
def _check(migration: TokenMigration, gathering: TokenGathering, depth: int, side: int, masked: int) -> None:
    refuse_merge(migration)
    check_masked(make_plan(migration, gathering, depth, (side, side)), masked)
