"""What the configuration itself says about a setting: the checks a run would make, made before anything is launched."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from itpn_core.errors import UserError
from itpn_core.reduction.config import TokenGathering, TokenMigration
from itpn_core.reduction.plan import check_window, make_plan
from orchestrator.config.tree import PretrainConfig
from orchestrator.sweep.space import Check, Setting

C = TypeVar("C")


def with_fields(config: C, fields: Mapping[str, Any]) -> C:
    """A copy of a configuration with some dotted fields changed; each owner checks its own values.

    Args:
        config: a frozen dataclass tree.
        fields: dotted field -> value.

    Raises:
        ValueError: a value that its owner does not allow.
    """
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    here |= {head: with_fields(getattr(config, head), part) for head, part in below.items()}
    return dataclasses.replace(config, **here)  # type: ignore[type-var]


def config_check(base: PretrainConfig, img_size: int = 0) -> Check:
    """A `Space.check` that builds the configuration of a setting and the token schedule of its grid.

    Args:
        base: the recipe's configuration, which a setting changes.
        img_size: side in pixels at which settings are measured; 0 = the configuration's own.
    """

    def refuse(setting: Setting) -> str:
        try:
            model = with_fields(base, setting.fields).model
            side = (img_size or model.img_size) // model.patch_size
            _plan(model.migration, model.gathering, model.depths[2], side)
        except UserError as error:
            return str(error)
        except ValueError as error:
            # torch-free owners raise plain ValueErrors with the same kind of text
            return str(error)
        return ""

    return refuse


@functools.lru_cache(maxsize=65536)
def _plan(migration: TokenMigration, gathering: TokenGathering, depth: int, side: int) -> None:
    check_window(gathering, (side, side))
    make_plan(migration, gathering, depth, (side, side))
