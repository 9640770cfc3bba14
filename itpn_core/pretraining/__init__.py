"""Masks, teachers and the objectives of masked feature modeling."""
