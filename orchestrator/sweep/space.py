"""The search space: conditional parameters, relations between them, and the settings that follow.

Everything here is a pure function of the recipe: settings are enumerated, counted and drawn without a clock, a file or
a generator with memory.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from itpn_core.errors import ConfigError, nearest
from itpn_core.random import stream_keys_numpy, uniform_numpy
from orchestrator.sweep.parameter import Parameter, Value, frozen, same

COUNT_LIMIT = 100_000
_TRIES = 10_000
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


class Setting(Mapping[str, Value]):
    """One point of a space: the parameters that exist there, with their values. Immutable and hashable."""

    def __init__(self, values: Mapping[str, Value], fields: Mapping[str, Value]) -> None:
        """Made by `Space.setting`.

        Args:
            values: parameter -> value, existing ones only.
            fields: configuration field -> value that follows.
        """
        self._values = dict(values)
        self._fields = dict(fields)
        self.key = json.dumps(self._values, sort_keys=True)
        """Canonical text: equal for equal settings, on every machine."""

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and self.key == other.key

    def __repr__(self) -> str:
        return "Setting(" + ", ".join(f"{name}={value}" for name, value in self._values.items()) + ")"

    @property
    def fields(self) -> dict[str, Value]:
        """Configuration field -> value."""
        return dict(self._fields)

    def overrides(self) -> list[str]:
        """Words for `jobs/pretrain.py`: `key.path=value`, the value as JSON (which is YAML)."""
        return [f"{name}={json.dumps(value)}" for name, value in self._fields.items()]


Check = Callable[[Setting], str]
"""Why a setting is impossible, or an empty string: what the space's own relations cannot say (see `legal.py`)."""


@dataclass(frozen=True)
class Relation:
    """`left OPERATOR right`, where each side is a parameter or a value; holds while a side does not exist."""

    text: str
    left: str
    operator: str
    right: str | Value
    right_is_name: bool

    def holds(self, values: Mapping[str, Value]) -> bool:
        """Whether a setting's values obey."""
        if self.left not in values or (self.right_is_name and self.right not in values):
            return True
        right = values[str(self.right)] if self.right_is_name else self.right
        return _OPERATORS[self.operator](values[self.left], right)


@dataclass(frozen=True)
class Space:
    """Parameters in an order in which each stands after those it depends on, and the relations between them."""

    parameters: tuple[Parameter, ...]
    relations: tuple[Relation, ...] = ()
    check: Check = field(default=lambda _: "", compare=False)

    def active(self, parameter: Parameter, values: Mapping[str, Value]) -> bool:
        """Whether a parameter exists beside the values chosen so far."""
        return all(
            name in values and any(same(values[name], wanted) for wanted in allowed) for name, allowed in parameter.when
        )

    def setting(self, values: Mapping[str, Any]) -> Setting:
        """The setting of given values, for example from a journal; relations are not asked (see `refusal`).

        Raises:
            ConfigError: a parameter is missing, unknown, or has a value outside its range.
        """
        values = {name: frozen(value) for name, value in values.items()}
        chosen: dict[str, Value] = {}
        for parameter in self.parameters:
            if not self.active(parameter, chosen):
                continue
            if parameter.name not in values:
                raise ConfigError(parameter.name, "(missing)", f"must be {parameter.allowed()}")
            if not parameter.holds(values[parameter.name]):
                raise ConfigError(parameter.name, values[parameter.name], f"must be {parameter.allowed()}")
            chosen[parameter.name] = values[parameter.name]
        for name in values:
            if name not in chosen:
                raise ConfigError(name, values[name], "does not exist here", nearest(name, chosen))
        return self._made(chosen)

    def _made(self, chosen: Mapping[str, Value]) -> Setting:
        fields: dict[str, Value] = {}
        lists: dict[str, list[tuple[int, Value]]] = {}
        for parameter in self.parameters:
            if not parameter.field:
                continue
            exists = parameter.name in chosen
            if parameter.index is not None:
                lists.setdefault(parameter.field, [])
                if exists:
                    lists[parameter.field].append((parameter.index, chosen[parameter.name]))
            elif exists or parameter.has_otherwise:
                fields[parameter.field] = chosen[parameter.name] if exists else parameter.otherwise
        # an element that does not exist leaves no gap: [a[0], a[2]] becomes a list of two
        fields |= {name: tuple(value for _, value in sorted(parts)) for name, parts in lists.items()}
        return Setting(chosen, fields)

    def refusal(self, setting: Setting) -> str:
        """Why a setting may not run: the relation it breaks or what `check` says; empty when it may."""
        for relation in self.relations:
            if not relation.holds(setting):
                return f"breaks {relation.text!r}"
        return self.check(setting)

    def grid(self, levels: int = 5) -> Iterator[Setting]:
        """Every legal setting, in a fixed order; continuous parameters take `levels` evenly spaced values."""
        for chosen in self._combinations(0, {}, levels):
            setting = self._made(chosen)
            if not self.refusal(setting):
                yield setting

    def _combinations(self, place: int, chosen: dict[str, Value], levels: int) -> Iterator[dict[str, Value]]:
        if place == len(self.parameters):
            yield chosen
            return
        parameter = self.parameters[place]
        options = parameter.grid(levels) if self.active(parameter, chosen) else None
        if options is None:
            yield from self._combinations(place + 1, chosen, levels)
            return
        for value in options:
            extended = {**chosen, parameter.name: value}
            # a broken relation ends its whole branch
            if all(relation.holds(extended) for relation in self.relations):
                yield from self._combinations(place + 1, extended, levels)

    @property
    def continuous(self) -> bool:
        """Whether some parameter has no countable values."""
        return any(parameter.count is None for parameter in self.parameters)

    def size(self, limit: int = COUNT_LIMIT) -> int | None:
        """Number of distinct legal settings; None when infinite; `limit + 1` when there are more than `limit`."""
        if self.continuous:
            return None
        return sum(1 for _ in islice(self.grid(), limit + 1))

    def describe(self, limit: int = COUNT_LIMIT) -> str:
        """One line for the log: how many parameters, how many settings."""
        size = self.size(limit)
        count = "infinitely many" if size is None else f"more than {limit}" if size > limit else str(size)
        names = ", ".join(parameter.name for parameter in self.parameters)
        return f"search space: {count} settings of {len(self.parameters)} parameters ({names})"

    def draw(self, seed: int, index: int) -> Setting:
        """A random legal setting: a pure function of the seed and the draw's number.

        Raises:
            ConfigError: no legal setting was found.
        """
        reason = ""
        for attempt in range(_TRIES):
            chosen: dict[str, Value] = {}
            for parameter in self.parameters:
                if self.active(parameter, chosen):
                    key = stream_keys_numpy(seed, attempt, [index], f"sweep/{parameter.name}")
                    chosen[parameter.name] = parameter.draw(float(uniform_numpy(key, 1)[0, 0]))
            setting = self._made(chosen)
            reason = self.refusal(setting)
            if not reason:
                return setting
        raise ConfigError(
            "sweep.constraints",
            [relation.text for relation in self.relations],
            f"none of {_TRIES} random settings is legal (the last one: {reason})",
            "Widen a range or drop a constraint.",
        )
