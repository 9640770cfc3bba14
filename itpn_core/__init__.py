"""iTPN and Fast-iTPN: models, masked feature modeling and evaluation on torch and timm alone.

Importing the package registers every model with timm.
"""

from itpn_core import models
from itpn_core.reduction import TokenGathering, TokenMigration

__all__ = ["TokenGathering", "TokenMigration", "models"]
