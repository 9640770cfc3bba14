"""Backbones, pre-training students and the feature pyramid of iTPN and Fast-iTPN."""

from itpn_core.models.backbone import Backbone, build_backbone
from itpn_core.models.config import ModelConfig
from itpn_core.models.fast_student import FastStudent
from itpn_core.models.pyramid import Levels, Pyramid

__all__ = ["Backbone", "FastStudent", "Levels", "ModelConfig", "Pyramid", "build_backbone"]
