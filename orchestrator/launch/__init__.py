"""Adapters to Ray Train and Ray Jobs."""
