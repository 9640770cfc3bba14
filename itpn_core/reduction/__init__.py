"""Token migration and token gathering: fewer tokens, and windows instead of global attention, in stage 3."""

from itpn_core.reduction.config import TokenGathering, TokenMigration

__all__ = ["TokenGathering", "TokenMigration"]
