"""Depth of every parameter, for learning rates that fall towards the stem (layer-wise decay)."""

from __future__ import annotations

from timm.models import group_parameters

from itpn_core.models.backbone import Backbone


def parameter_depths(model: Backbone) -> dict[str, int]:
    """Depth by parameter name: 0 for embedding and positions, then one per block, the head and its norm deepest.

    A merge counts with the block before it (`Backbone.group_matcher`).
    """
    depths: dict[str, int] = group_parameters(model, model.group_matcher(), reverse=True)
    return depths
