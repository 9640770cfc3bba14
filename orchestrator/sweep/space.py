"""The search space: conditional parameters, relations between them, and the settings that follow.

Everything here is a pure function of the recipe: settings are enumerated, counted and drawn without a clock, a file or
a generator with memory.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from itpn_core.errors import ConfigError, nearest
from itpn_core.random import stream_keys_numpy, uniform_numpy
from orchestrator.sweep.parameter import Parameter, Value, frozen, parse_parameter, same

COUNT_LIMIT = 100_000
_TRIES = 10_000
_NAME = re.compile(r"[A-Za-z_][\w.]*(\[\d+\])?")
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


def parse_space(
    space: Any,
    relations: Any = (),
    *,
    known: Iterable[str] | None = None,
    check: Check = lambda _: "",
    where: str = "sweep",
) -> Space:
    """Reads `sweep.space` and `sweep.constraints` of a recipe, and proves that something in it can run.

    Args:
        space: mapping of parameter name to its values and conditions.
        relations: list of texts such as `model.migration.layers[0] < model.migration.layers[1]`.
        known: configuration fields that exist; None accepts any.
        check: what else makes a setting impossible.
        where: the recipe's section, for messages.

    Raises:
        ConfigError: a wrong name, value, condition or relation, or a space without any legal setting.
    """
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"{where}.space", space, "must be a mapping with at least one parameter")
    parsed: dict[str, Parameter] = {}
    fields = None if known is None else list(known)
    for name, body in _flat_names(space).items():
        _check_name(f"{where}.space", name, fields)
        parsed[name] = parse_parameter(f"{where}.space.{name}", name, body)
    _check_elements(f"{where}.space", parsed)
    ordered = _ordered(f"{where}.space", parsed)
    if not isinstance(relations, (list, tuple)):
        raise ConfigError(f"{where}.constraints", relations, "must be a list of texts such as 'a < b'")
    built = Space(ordered, tuple(_relation(f"{where}.constraints", text, parsed) for text in relations), check)
    built.draw(0, 0)
    return built


def _flat_names(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections (`model: {migration: {...}}`) as dotted names; a mapping that says its values is a parameter."""
    flat: dict[str, Any] = {}
    for name, body in tree.items():
        if _is_section(body):
            flat |= _flat_names(body, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = body
    return flat


def _is_section(body: Any) -> bool:
    says_values = isinstance(body, Mapping) and {"choices", "low", "high"} & set(body)
    return bool(
        isinstance(body, Mapping)
        and body
        and not says_values
        and all(isinstance(part, (Mapping, list)) for part in body.values())
    )


def _check_name(where: str, name: str, known: list[str] | None) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(where, name, "must be a field (a.b), a list's element (a.b[0]) or a plain word")
    stem = name.partition("[")[0]
    if "." not in stem and "[" in name:
        raise ConfigError(where, name, "only a configuration field has elements")
    if "." in stem and known is not None and stem not in known:
        raise ConfigError(where, name, "there is no such setting", nearest(stem, known))


def _check_elements(where: str, parsed: Mapping[str, Parameter]) -> None:
    for parameter in parsed.values():
        if parameter.index is None:
            continue
        if parameter.field in parsed:
            raise ConfigError(where, parameter.name, f"{parameter.field} is already a parameter as a whole")
        if parameter.has_otherwise:
            raise ConfigError(
                f"{where}.{parameter.name}.otherwise", parameter.otherwise, "a list's element is absent instead"
            )


def _ordered(where: str, parsed: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    """Parameters after those that their conditions name, otherwise in the recipe's order."""
    for parameter in parsed.values():
        for name, values in parameter.when:
            if name not in parsed:
                place = f"{where}.{parameter.name}.when"
                raise ConfigError(place, name, "there is no such parameter", nearest(name, parsed))
            for value in values:
                if not parsed[name].holds(value):
                    allowed = parsed[name].allowed()
                    raise ConfigError(f"{where}.{parameter.name}.when.{name}", value, f"must be {allowed}")
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parsed):
        ready = [p for p in parsed.values() if p.name not in ordered and all(name in ordered for name, _ in p.when)]
        if not ready:
            circle = [name for name in parsed if name not in ordered]
            raise ConfigError(where, circle, "depend on each other in a circle", "Remove one of their conditions.")
        ordered[ready[0].name] = ready[0]
    return tuple(ordered.values())


def _relation(where: str, text: Any, parsed: Mapping[str, Parameter]) -> Relation:
    match = re.fullmatch(r"\s*(\S+?)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*", text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(where, text, "must read 'parameter < parameter' or 'parameter <= value'")
    left, sign, right = match.groups()
    if left not in parsed:
        raise ConfigError(where, text, f"there is no parameter {left!r}", nearest(left, parsed))
    is_name = right in parsed
    value = right if is_name else _literal(right)
    if not is_name and isinstance(value, str):
        raise ConfigError(where, text, f"{right!r} is neither a parameter nor a number", nearest(right, parsed))
    for name in (left, right) if is_name else (left,):
        if parsed[name].kind == "categorical" and not all(
            isinstance(choice, (int, float)) for choice in parsed[name].choices
        ):
            raise ConfigError(where, text, f"{name} is not a number, so it cannot be compared")
    return Relation(text, left, sign, value, is_name)


def _literal(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
