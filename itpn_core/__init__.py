"""iTPN and Fast-iTPN: models, masked feature modeling and evaluation on torch and timm alone."""
