"""Manifest, order, store, decode and loader."""
