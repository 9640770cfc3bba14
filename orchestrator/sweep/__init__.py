"""Sweeps: search space, objectives, front, pruning and sampling as plain decisions, with a thin Ray shell."""
