"""What a trial must keep to count: `images_per_second >= 100`, `accuracy_loss <= 0.01`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from itpn_core.errors import ConfigError, nearest


@dataclass(frozen=True)
class Limit:
    """A measured value that must stay on one side: `images_per_second >= 100` or `accuracy_loss <= 0.01`."""

    name: str
    operator: str
    bound: float

    def violation(self, values: Mapping[str, float]) -> float:
        """By how much the limit is missed; 0 or less when it is kept."""
        return self.bound - values[self.name] if self.operator == ">=" else values[self.name] - self.bound


def parse_limits(texts: Any, names: Iterable[str], where: str = "sweep.limits") -> tuple[Limit, ...]:
    """Reads texts such as `images_per_second >= 100`.

    Args:
        texts: a list of them.
        names: values that every trial measures.
        where: place in the recipe, for messages.

    Raises:
        ConfigError: an unreadable text or an unknown name.
    """
    known = list(names)
    limits = []
    if not isinstance(texts, (list, tuple)):
        raise ConfigError(where, texts, "must be a list of texts such as 'images_per_second >= 100'")
    for text in texts:
        words = str(text).split()
        try:
            name, sign, bound = words[0], words[1], float(words[2])
        except (IndexError, ValueError):
            raise ConfigError(where, text, "must read 'value >= number' or 'value <= number'") from None
        if sign not in (">=", "<=") or len(words) != 3:
            raise ConfigError(where, text, "must read 'value >= number' or 'value <= number'")
        if name not in known:
            raise ConfigError(where, text, f"no trial measures {name!r}", nearest(name, known))
        limits.append(Limit(name, sign, bound))
    return tuple(limits)
