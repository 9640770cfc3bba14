"""Backbones, attention, feature pyramid, timm registration and checkpoint import."""
