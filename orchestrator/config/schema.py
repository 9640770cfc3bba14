"""What settings exist: read from the dataclasses that own them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Leaf:
    """One setting."""

    key: str
    """Dotted path, for example `train.optimizer.lr`."""
    type_name: str
    default: Any
    help: str
    choices: tuple[str, ...]
    affects_result: bool
    """False for settings that only say where or how fast a run goes; they do not enter the run's fingerprint."""


def leaves(schema: type[Any], prefix: str = "", *, affects_result: bool = True) -> list[Leaf]:
    """Every setting of a configuration dataclass, depth first in the order of declaration.

    Args:
        schema: a dataclass whose fields are leaves or further dataclasses.
        prefix: dotted path of `schema` itself.
        affects_result: inherited by all fields; a field's metadata `{"affects_result": False}` turns it off below.
    """
    hints = typing.get_type_hints(schema)
    found: list[Leaf] = []
    for item in dataclasses.fields(schema):
        key = f"{prefix}{item.name}"
        hint = hints[item.name]
        counts = affects_result and bool(item.metadata.get("affects_result", True))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += leaves(hint, f"{key}.", affects_result=counts)
            continue
        choices = tuple(c for c in str(item.metadata.get("choices", "")).split(",") if c)
        found.append(Leaf(key, _type_name(hint), _default(item), str(item.metadata.get("help", "")), choices, counts))
    return found


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return "(required)"


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def flatten(tree: dict[str, Any], prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """Nested dictionaries to dotted keys; lists and scalars are leaves.

    Args:
        tree: what to flatten.
        prefix: dotted path of `tree` itself.
        whole: keys whose value is a mapping that stays one.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in whole:
            flat |= flatten(value, f"{key}.", whole)
        else:
            flat[key] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dictionaries: the reverse of `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def mappings(schema: type[Any]) -> frozenset[str]:
    """Settings whose value is a mapping of the user's own keys."""
    return frozenset(leaf.key for leaf in leaves(schema) if leaf.type_name.startswith("dict"))


def flat_values(config: Any) -> dict[str, Any]:
    """The values of a configuration object by dotted key."""
    return flatten(dataclasses.asdict(config), whole=mappings(type(config)))


def help_text(schema: type[Any]) -> str:
    """One line per setting: key, type, default and meaning, grouped by section."""
    lines: list[str] = []
    section = None
    for leaf in leaves(schema):
        head = leaf.key.rsplit(".", 1)[0] if "." in leaf.key else ""
        if head != section:
            section = head
            lines.append(f"\n{head or 'general'}:")
        default = f'"{leaf.default}"' if isinstance(leaf.default, str) else leaf.default
        lines.append(f"  {leaf.key}  ({leaf.type_name}, default {default})\n      {leaf.help}")
    return "\n".join(lines)
