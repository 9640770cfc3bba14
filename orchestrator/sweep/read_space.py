"""`sweep.space` and `sweep.constraints` of a recipe, read and proved to hold something that can run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from itpn_core.errors import ConfigError, nearest
from orchestrator.sweep.parameter import Parameter, parse_parameter
from orchestrator.sweep.space import Check, Relation, Space

_NAME = re.compile(r"[A-Za-z_][\w.]*(\[\d+\])?")


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
