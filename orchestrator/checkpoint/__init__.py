"""Saving and restoring of a training state."""
