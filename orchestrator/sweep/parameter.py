"""One dimension of a search space: what it may be, when it exists, and how it is read from a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from itpn_core.errors import ConfigError, nearest

Value = bool | int | float | str | None | tuple[Any, ...]
"""What a parameter can be; lists of a recipe become tuples."""

CATEGORICAL, INTEGER, FLOAT = "categorical", "integer", "float"
_WORDS = ("choices", "low", "high", "step", "log", "when", "otherwise")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_MISSING = object()


@dataclass(frozen=True)
class Parameter:
    """A named dimension.

    Attributes:
        name: a dotted configuration field, one element of a list field (`model.migration.keep[0]`), or a plain word
            without a dot that sets nothing and only steers conditions (`drops`).
        kind: "categorical" | "integer" | "float".
        choices: values of a categorical parameter.
        low: smallest value of a number.
        high: largest value of a number.
        step: distance of two values; 0 = continuous (floats only).
        log: draw evenly in the logarithm.
        when: (parameter, values) pairs that must all hold for this parameter to exist.
        otherwise: value of the field while the parameter does not exist.
        has_otherwise: whether `otherwise` was given; without it the recipe's own value stays.
    """

    name: str
    kind: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    log: bool = False
    when: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    otherwise: Value = None
    has_otherwise: bool = False

    @property
    def field(self) -> str:
        """The configuration field that the parameter belongs to; empty for one that only steers conditions."""
        return self.name.partition("[")[0] if "." in self.name else ""

    @property
    def index(self) -> int | None:
        """Which element of a list field; None for a whole field."""
        return int(self.name[:-1].partition("[")[2]) if self.name.endswith("]") else None

    @property
    def count(self) -> int | None:
        """Number of values; None when there is no end of them."""
        if self.kind == CATEGORICAL:
            return len(self.choices)
        return None if self.step == 0 else 1 + math.floor((self.high - self.low) / self.step + 1e-9)

    def at(self, position: int) -> Value:
        """Value number `position` of a countable parameter, from the lowest."""
        if self.kind == CATEGORICAL:
            return self.choices[position]
        # rounding takes away the dust of repeated steps: 0.6, not 0.6000000000000001
        value = round(self.low + position * self.step, 12)
        return int(value) if self.kind == INTEGER else float(value)

    def grid(self, levels: int) -> tuple[Value, ...]:
        """All values of a countable parameter; `levels` evenly spaced ones (in the logarithm) of a continuous one."""
        if self.count is not None:
            return tuple(self.at(position) for position in range(self.count))
        places = [0.5] if levels == 1 else [place / (levels - 1) for place in range(levels)]
        return tuple(self._continuous(place) for place in places)

    def draw(self, uniform: float) -> Value:
        """The value at a place in [0, 1) of the parameter's range; every value of a countable one is equally likely."""
        if self.log and self.count is not None:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return int(min(max(round(math.exp(low + uniform * (high - low))), self.low), self.high))
        return self.at(int(uniform * self.count)) if self.count is not None else self._continuous(uniform)

    def _continuous(self, place: float) -> float:
        if self.log:
            value = math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + place * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def holds(self, value: Value) -> bool:
        """Whether `value` is one that the parameter can have."""
        if self.kind == CATEGORICAL:
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        if self.kind == INTEGER and value != int(value):
            return False
        return self.step == 0 or abs((value - self.low) / self.step - round((value - self.low) / self.step)) < 1e-6

    def allowed(self) -> str:
        """The values in words."""
        if self.kind == CATEGORICAL:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{'an integer' if self.kind == INTEGER else 'a number'} from {self.low:g} to {self.high:g}{step}"


def same(first: Value, second: Value) -> bool:
    """Equality that keeps True and 1 apart."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def number(value: Any) -> Any:
    """A number that YAML 1.1 read as text (`1e-3`); anything else unchanged."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def parse_parameter(where: str, name: str, body: Any) -> Parameter:
    """Reads one entry of `sweep.space`.

    Args:
        where: dotted place in the recipe, for messages.
        name: the parameter.
        body: a mapping with `choices`, or `low` and `high` (and `step`, `log`); both with `when` and `otherwise`.

    Raises:
        ConfigError: words that do not exist or values that do not fit together.
    """
    if isinstance(body, list):
        body = {"choices": body}
    if not isinstance(body, Mapping):
        raise ConfigError(
            where,
            body,
            "must be a mapping",
            "Write {choices: [a, b]} or {low: 1, high: 9}, and `when:` if conditional.",
        )
    for word in body:
        if word not in _WORDS:
            raise ConfigError(f"{where}.{word}", body[word], "there is no such word", nearest(str(word), _WORDS))
    rest: dict[str, Any] = {"when": _parse_when(f"{where}.when", body.get("when", {}))}
    otherwise = body.get("otherwise", _MISSING)
    if otherwise is not _MISSING:
        rest |= {"otherwise": frozen(otherwise), "has_otherwise": True}
    if "choices" in body:
        return _categorical(where, name, body, rest)
    return _number(where, name, body, rest)


def _categorical(where: str, name: str, body: Mapping[str, Any], rest: dict[str, Any]) -> Parameter:
    for word in ("low", "high", "step", "log"):
        if word in body:
            raise ConfigError(f"{where}.{word}", body[word], "cannot stand beside choices", "Remove one of the two.")
    choices = body["choices"]
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"{where}.choices", choices, "must be a list of at least one value")
    values = tuple(frozen(number(choice)) for choice in choices)
    for place, value in enumerate(values):
        if any(same(value, other) for other in values[:place]):
            raise ConfigError(f"{where}.choices", choices, f"{value!r} stands there twice")
    return Parameter(name, CATEGORICAL, choices=values, **rest)


def _number(where: str, name: str, body: Mapping[str, Any], rest: dict[str, Any]) -> Parameter:
    for word in ("low", "high"):
        if word not in body:
            raise ConfigError(where, dict(body), f"{word} is missing", "Give choices, or both low and high.")
    low, high, step = number(body["low"]), number(body["high"]), number(body.get("step", 0))
    for word, value in (("low", low), ("high", high), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}.{word}", value, "must be a number")
    log = body.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log", log, "must be true or false")
    if low > high:
        raise ConfigError(f"{where}.low", low, f"must be at most high = {high!r}")
    if log and low <= 0:
        raise ConfigError(f"{where}.low", low, "must be above 0 with log: true")
    if step < 0 or (step and high > low and step > high - low):
        raise ConfigError(f"{where}.step", step, f"must lie in 0 to {high - low:g}, the width of the range")
    integer = all(isinstance(value, int) for value in (low, high, step))
    kind, step = (INTEGER, step or 1) if integer else (FLOAT, step)
    if log and "step" in body:
        raise ConfigError(f"{where}.step", step, "cannot stand beside log: true", "List the values as choices.")
    return Parameter(name, kind, low=low, high=high, step=step, log=log, **rest)


def _parse_when(where: str, body: Any) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    if not isinstance(body, Mapping):
        raise ConfigError(where, body, "must be a mapping of parameter: value or parameter: [values]")
    pairs = []
    for name, values in body.items():
        listed = values if isinstance(values, list) else [values]
        pairs.append((str(name), tuple(frozen(number(value)) for value in listed)))
    return tuple(pairs)


def frozen(value: Any) -> Value:
    """Lists as tuples, all the way down."""
    return tuple(frozen(part) for part in value) if isinstance(value, (list, tuple)) else value
