"""Depth of every parameter, for learning rates that fall towards the stem (layer-wise decay)."""

from __future__ import annotations

from timm.models._manipulate import group_with_matcher

from itpn_core.models.backbone import Backbone


def parameter_depths(model: Backbone) -> dict[str, int]:
    """Depth by parameter name: 0 for embedding and positions, then one per block, the head and its norm deepest.

    A merge counts with the block before it (`Backbone.group_matcher`).
    """
    depths: dict[str, int] = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    return depths
