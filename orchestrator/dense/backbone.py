"""The backbone with its pyramid for dense tasks: from a checkpoint, or untrained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from itpn_core.models.backbone import Backbone
from itpn_core.models.config import ModelConfig
from orchestrator.checkpoint.source import open_source
from orchestrator.data.store import StoreConfig
from orchestrator.dense.config import BackboneConfig


@dataclass(frozen=True)
class Opened:
    """A backbone with a pyramid, and what its images are normalised with."""

    model: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    story: str
    """Where the weights come from, for people."""


def open_backbone(config: BackboneConfig, model: ModelConfig, store: StoreConfig | None = None) -> Opened:
    """Builds the backbone with its pyramid.

    Args:
        config: checkpoint, pyramid and attention.
        model: shape without a checkpoint.
        store: endpoint of object stores.

    Raises:
        UserError: the checkpoint cannot be used, or the token reduction does not fit the model.
    """
    if config.checkpoint:
        source = open_source(config.checkpoint, store, pyramid=True)
        trained = config.pyramid == "auto" and bool(source.pyramid_dim)
        options: dict[str, Any] = {} if source.pyramid_dim else {"pyramid_dim": config.pyramid_dim}
        backbone, report = source.build(
            with_pyramid=trained, num_classes=0, drop_path_rate=config.drop_path_rate, **options
        )
        pyramid = (
            "the checkpoint's" if trained else ("new, as asked" if source.pyramid_dim else "new: none in the file")
        )
        opened = Opened(backbone, source.mean, source.std, f"{report}\n  pyramid: {pyramid}")
    else:
        backbone = Backbone(model, pyramid_dim=config.pyramid_dim, final_norm="tokens")
        opened = Opened(backbone, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "no checkpoint: all weights are new")
    migration = config.migration if config.migration.layers else backbone.migration
    gathering = config.gathering if config.gathering.window else backbone.gathering
    backbone.set_token_reduction(*(() if config.plain else (migration, gathering)))
    backbone.set_grad_checkpointing(config.grad_checkpointing)
    return opened
