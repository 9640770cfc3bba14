"""Typed records, the journal, and MLflow as its follower."""
