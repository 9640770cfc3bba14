"""Measurements of what this package computes: speed, memory, FLOPs, and what speed costs in quality."""
