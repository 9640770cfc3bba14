"""Backbones, pre-training students and the feature pyramid of iTPN and Fast-iTPN."""

from itpn_core.models import registry
from itpn_core.models.backbone import Backbone, build_backbone
from itpn_core.models.clip_student import ClipStudent
from itpn_core.models.config import ModelConfig
from itpn_core.models.dense import DetectionPyramid, SegmentationPyramid
from itpn_core.models.fast_student import FastStudent
from itpn_core.models.importer import LoadReport, export_checkpoint, load_checkpoint, model_from_checkpoint
from itpn_core.models.inference import for_inference
from itpn_core.models.pixel_student import PixelStudent, ids_from_mask, patch_pixels
from itpn_core.models.pyramid import Levels, Pyramid

__all__ = [
    "Backbone",
    "ClipStudent",
    "DetectionPyramid",
    "FastStudent",
    "Levels",
    "LoadReport",
    "ModelConfig",
    "PixelStudent",
    "Pyramid",
    "SegmentationPyramid",
    "build_backbone",
    "export_checkpoint",
    "for_inference",
    "ids_from_mask",
    "load_checkpoint",
    "model_from_checkpoint",
    "patch_pixels",
    "registry",
]
