"""The error that a person sees when a setting is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from itpn_core.errors import UserError


class SettingError(UserError):
    """A setting is unknown, of the wrong type or impossible; the text names key, value and what is allowed."""


def nearest_key(word: str, words: Iterable[str]) -> str:
    """The word most like `word`, or an empty string when none is close.

    A dotted key is compared as a whole first and then by its last part, so that `train.lr` finds `train.optimizer.lr`.
    """
    candidates = list(words)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    if close:
        return close[0]
    leaf = word.rsplit(".", 1)[-1]
    by_leaf = [c for c in candidates if c.rsplit(".", 1)[-1] == leaf]
    if by_leaf:
        return by_leaf[0]
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return close[0] if close else ""
