"""Measurements of the data plane: `python -m orchestrator.data.benchmark --help`."""
