"""What a person says about token reduction: two small frozen dataclasses.

Both describe stage 3 only, the one stage with attention. The defaults reduce nothing, so either can sit in a model's
configuration as it is. What depends on a model (its depth, its grid) is checked in `itpn_core.reduction.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeVar

from itpn_core.errors import ConfigError, nearest

RULES = ("redundancy", "random", "norm", "merge")
SIMILARITIES = ("features", "keys")
PARTNERS = ("checkerboard", "neighbours")
POOLS = ("grid", "survivors")
RESTORES = ("carried", "parked")


Config = TypeVar("Config", "TokenMigration", "TokenGathering")


def _check_choice(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(where, value, "must be one of " + ", ".join(allowed))


def _int_tuple(where: str, values: Iterable[int]) -> tuple[int, ...]:
    """A tuple of ints from any sequence (configuration files give lists)."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise ConfigError(where, values, "must be a sequence of integers, for example (4,)")
    result = tuple(values)
    for value in result:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(where, result, "must be a sequence of integers")
    return result


def _check_layers(where: str, layers: tuple[int, ...]) -> None:
    for layer in layers:
        if layer < 0:
            raise ConfigError(
                where,
                layers,
                "must lie in 0 to depth of stage 3 - 1",
                f"{layer} is before stage 3, where no layer mixes positions and no token can be dropped.",
            )
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ConfigError(where, layers, "must be strictly increasing")


@dataclass(frozen=True)
class TokenMigration:
    """Drop redundant tokens inside stage 3 and put their parked values back into the grid at its end.

    "Before layer l" is 0-based: layers 0..l-1 see every token. A keep ratio is of the tokens that enter its layer;
    the number kept is `8 * ceil(ratio * n / 8)`, the same for every image. Source: Fast-iTPN (arXiv 2211.12735v2) has
    the idea; schedule, score and tie rules are defined by this project (docs/token_reduction.md).

    Raises:
        ValueError: a field is outside its range; the text names field, value and range.
    """

    layers: tuple[int, ...] = field(
        default=(), metadata={"help": "stage-3 layers before which tokens are dropped, 0-based, increasing; () = never"}
    )
    keep: tuple[float, ...] = field(
        default=(), metadata={"help": "one ratio in (0, 1] per layer: the part of the entering tokens that stays"}
    )
    similarity: str = field(
        default="features", metadata={"help": "what the score compares: features | keys (norm1 and k_proj, head mean)"}
    )
    partners: str = field(
        default="checkerboard",
        metadata={"help": "partner set of the redundancy score: checkerboard (halves) | neighbours (3x3)"},
    )
    rule: str = field(
        default="redundancy",
        metadata={"help": "redundancy, or a baseline: random | norm (drop the smallest) | merge (ToMe style)"},
    )
    replenish: bool = field(
        default=True, metadata={"help": "put parked tokens back at the end; false leaves their cells zero (baseline)"}
    )
    restore: str = field(
        default="carried",
        metadata={
            "help": "what a dropped cell holds at the end: carried (its value at the drop plus what its most similar "
            "survivor gained since) | parked (the value alone); merge and replenish = false do not read it"
        },
    )
    pool: str = field(
        default="grid", metadata={"help": "tokens that classification averages: grid (all) | survivors (undropped)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of rule = random; the other rules draw nothing"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _int_tuple("TokenMigration.layers", self.layers))
        if not isinstance(self.keep, (tuple, list)):
            raise ConfigError(
                "TokenMigration.keep",
                self.keep,
                "must be a sequence of ratios above 0 and at most 1, for example (0.5,)",
            )
        object.__setattr__(self, "keep", tuple(self.keep))
        _check_layers("TokenMigration.layers", self.layers)
        self._check_keep()
        _check_choice("TokenMigration.similarity", self.similarity, SIMILARITIES)
        _check_choice("TokenMigration.partners", self.partners, PARTNERS)
        _check_choice("TokenMigration.rule", self.rule, RULES)
        _check_choice("TokenMigration.restore", self.restore, RESTORES)
        _check_choice("TokenMigration.pool", self.pool, POOLS)
        if self.rule == "merge" and not self.replenish:
            raise ConfigError(
                "TokenMigration.replenish",
                False,
                "must be true with rule = 'merge'",
                "Unmerging is its way to replenish.",
            )

    def _check_keep(self) -> None:
        if len(self.keep) != len(self.layers):
            raise ConfigError(
                "TokenMigration.keep",
                self.keep,
                f"must hold one ratio per layer, here {len(self.layers)} for layers {self.layers}",
            )
        for ratio in self.keep:
            is_number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
            if not is_number or not math.isfinite(ratio) or not 0.0 < ratio <= 1.0:
                raise ConfigError("TokenMigration.keep", ratio, "must be above 0 and at most 1")
            if ratio < 0.5 and self.two_sided:
                raise ConfigError(
                    "TokenMigration.keep",
                    ratio,
                    "must lie in 0.5 to 1 with checkerboard halves, of which only one side may be dropped per step",
                    "Use two drops, or partners = 'neighbours'.",
                )

    @property
    def two_sided(self) -> bool:
        """Whether only one checkerboard colour may be dropped per step."""
        return self.rule == "merge" or (self.rule == "redundancy" and self.partners == "checkerboard")

    @property
    def carries(self) -> bool:
        """Whether dropped tokens take part in what their most similar survivors gain."""
        return self.restore == "carried" and self.replenish and self.rule != "merge"

    @property
    def active(self) -> bool:
        """Whether any setting drops a token (a ratio of 1 drops none)."""
        return any(ratio < 1.0 for ratio in self.keep)


@dataclass(frozen=True)
class TokenGathering:
    """Replace global attention of stage 3 by window attention plus a few gathering tokens.

    Source: Fast-iTPN (arXiv 2211.12735v2) has the idea; read and write steps, the zero-shot start and the variants
    are defined by this project (docs/token_reduction.md).

    Raises:
        ValueError: a field is outside its range; the text names field, value and range.
    """

    window: int = field(
        default=0, metadata={"help": "side of the attention windows in stage-3 cells, up to the grid's; 0 = global"}
    )
    tokens: int = field(default=4, metadata={"help": "gathering tokens (in all, or per window); 0 = windows alone"})
    per_window: bool = field(
        default=False, metadata={"help": "own gathering tokens in each window that exchange, then join their window"}
    )
    simultaneous: bool = field(
        default=False, metadata={"help": "write from the tokens before their read: one block mask, another function"}
    )
    global_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "stage-3 layers whose attention stays global, 0-based, increasing"}
    )
    learn: bool = field(
        default=False,
        metadata={"help": "make the gathering tokens parameters to train; else trained ones if there are, or pooled"},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_layers", _int_tuple("TokenGathering.global_layers", self.global_layers))
        _check_layers("TokenGathering.global_layers", self.global_layers)
        for name, value in (("window", self.window), ("tokens", self.tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"TokenGathering.{name}", value, "must be an integer of 0 or more")

    @property
    def active(self) -> bool:
        """Whether windows are asked for at all."""
        return self.window > 0


def as_migration(value: TokenMigration | dict[str, Any] | None) -> TokenMigration:
    """A `TokenMigration` from itself, from keyword values (timm's `create_model`, a parsed file) or None (off)."""
    return _build(TokenMigration, value)


def as_gathering(value: TokenGathering | dict[str, Any] | None) -> TokenGathering:
    """A `TokenGathering` from itself, from keyword values or None (off)."""
    return _build(TokenGathering, value)


def _build(kind: type[Config], value: Config | dict[str, Any] | None) -> Config:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"expected {kind.__name__}, a dict of its fields or None; got {type(value).__name__}")
    known = [item.name for item in fields(kind)]
    for name in value:
        if name not in known:
            raise ConfigError(f"{kind.__name__}.{name}", value[name], "there is no such field", nearest(name, known))
    return kind(**value)
