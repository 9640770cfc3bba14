"""Trained weights as files that run elsewhere, each re-loaded in a fresh process and compared before it is kept."""
