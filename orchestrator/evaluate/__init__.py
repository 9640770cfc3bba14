"""Frozen-backbone evaluation over shards."""
