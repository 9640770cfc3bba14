"""The errors a user can cause, and how they are worded.

Each message says what was wrong, where, the value that was found, what is allowed and what to do. All of them are
`ValueError`, so that a caller outside this project needs no import to catch them; the entry points turn the family into
one printed line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right: settings, files, sizes that do not fit."""


class ConfigError(UserError):
    """A setting has a value that is not allowed, alone or together with another one."""

    def __init__(self, key: str, value: object, allowed: str, hint: str = "") -> None:
        """Words the message.

        Args:
            key: dotted path of the setting, for example "objective.mask_ratio".
            value: the value that was found.
            allowed: what is allowed, in words.
            hint: what to do; empty when `allowed` says it.
        """
        super().__init__(f"{key} = {value!r}: {allowed}." + (f" {hint}" if hint else ""))
        self.key = key
        self.value = value


class WeightsError(UserError):
    """A weights file is missing, damaged, unsafe to read, or belongs to another model."""


class CollapseError(UserError):
    """Training has lost the spread of its features and would only burn time from here on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Words a suggestion for a misspelt name.

    Args:
        name: what the user wrote.
        known: the names that exist.

    Returns:
        "Did you mean 'x'?" with the most similar known name, or "Known: a, b, c." when none is similar.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
