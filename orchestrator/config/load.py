"""From a recipe file and `key=value` words to a frozen dataclass; the only place that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.config.errors import SettingError, nearest_key
from orchestrator.config.schema import Leaf, flat_values, flatten, leaves, mappings

T = TypeVar("T")


def load(
    schema: type[T],
    recipe: str | Path | None,
    overrides: Sequence[str],
    base: Mapping[str, Any] | None = None,
) -> T:
    """Builds the configuration: defaults, then `base`, then the recipe, then the command line.

    Args:
        schema: dataclass that owns the settings.
        recipe: YAML file, or None for the defaults alone.
        overrides: words such as `train.epochs=3`; the value is read as YAML.
        base: values by dotted key that replace defaults (what a checkpoint says about itself).

    Raises:
        SettingError: an unreadable recipe, an unknown key or a value of the wrong type.
    """
    known, whole = {leaf.key: leaf for leaf in leaves(schema)}, mappings(schema)
    values: dict[str, tuple[Any, str]] = {key: (value, "checkpoint") for key, value in (base or {}).items()}
    if recipe is not None:
        values |= {key: (value, f"recipe {recipe}") for key, value in flatten(read_recipe(recipe), whole=whole).items()}
    for word in overrides:
        key, value = _parse_override(word)
        values |= {k: (v, "command line") for k, v in flatten({key: value}, whole=whole).items()}
    return _build(schema, known, values)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Reads a recipe file as plain dictionaries.

    Raises:
        SettingError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError(f"cannot read recipe {str(path)!r}: {error.strerror}. Give --recipe a YAML file.") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SettingError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"recipe {str(path)!r} must be a mapping of sections, not {type(tree).__name__}")
    return cast("dict[str, Any]", tree)


def _parse_override(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise SettingError(f"cannot read {word!r}: write settings as key.path=value, for example train.epochs=3")
    try:
        return key, yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise SettingError(
            f"the value of {key!r} is not valid YAML: {text!r}. Quote it, or check its brackets"
        ) from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; people mean the number."""
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _build(schema: type[T], known: dict[str, Leaf], values: dict[str, tuple[Any, str]]) -> T:
    node = OmegaConf.structured(schema)
    OmegaConf.set_struct(node, True)
    OmegaConf.set_readonly(node, False)
    for key in mappings(schema):
        # Their keys are the user's own.
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    for key, (raw, source) in values.items():
        leaf = known.get(key)
        if leaf is None:
            raise SettingError(_unknown_key(key, raw, source, known))
        value = raw if leaf.type_name == "str" else _numbers(raw)
        if leaf.choices and value not in leaf.choices:
            raise SettingError(
                f"{key}={value!r} ({source}) is not one of: {', '.join(leaf.choices)}{_did_you_mean(value, leaf)}"
            )
        try:
            # Merging one leaf at a time keeps the key in hand: OmegaConf drops it for tuples.
            node = OmegaConf.merge(node, OmegaConf.create(_nest(key, value)))
        except OmegaConfBaseException:
            raise SettingError(
                f"{key}={value!r} ({source}) has the wrong type: expected {leaf.type_name}, got {type(value).__name__}."
                f" Default: {leaf.default!r}. {leaf.help}"
            ) from None
    return cast("T", _construct(schema, cast("dict[str, Any]", OmegaConf.to_container(node)), ""))


def _construct(schema: type[Any], values: dict[str, Any], where: str) -> Any:
    """Builds nested dataclasses; what a dataclass refuses by itself is told with the section it stands in.

    Raises:
        SettingError: a value that its owner does not allow.
    """
    hints = typing.get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        value, hint = values[item.name], hints[item.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            arguments[item.name] = _construct(hint, value, f"{where}.{item.name}" if where else item.name)
        else:
            arguments[item.name] = tuple(value) if isinstance(value, list) else value
    try:
        return schema(**arguments)
    except ValueError as error:
        text = str(error)
        raise SettingError(text if not where or text.startswith(f"{where}.") else f"{where}: {text}") from None


def _did_you_mean(value: Any, leaf: Leaf) -> str:
    guess = nearest_key(str(value), leaf.choices)
    return f". Did you mean {guess!r}?" if guess else ""


def _unknown_key(key: str, value: Any, source: str, known: dict[str, Leaf]) -> str:
    below = [k for k in known if k.startswith(f"{key}.")]
    if below:
        return f"{key!r} ({source}) is a section and takes no value ({value!r}). It holds: {', '.join(below)}"
    guess = nearest_key(key, known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown key {key!r} (value {value!r}, {source}).{hint} --help lists every key."


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nest(rest, value) if rest else value}


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal object."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_recipe(config: Any, keep: Collection[str] = ()) -> str:
    """A short recipe: what differs from the defaults, as YAML that `load` reads back to an equal object.

    Args:
        config: a configuration.
        keep: settings, or sections with a dot at their end, that are written although they are defaults.
    """
    defaults, tree = flat_values(type(config)()), cast("dict[str, Any]", {})
    for key, value in flat_values(config).items():
        if value != defaults[key] or any(key == kept or (kept[-1] == "." and key.startswith(kept)) for kept in keep):
            node = tree
            *sections, leaf = key.split(".")
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = list(value) if isinstance(value, tuple) else value
    return str(OmegaConf.to_yaml(OmegaConf.create(tree)))
