"""Keep credentials out of everything that is recorded.

Records travel (journal, MLflow, reports), so redaction happens before the first byte is written. Three nets: names that
mean a secret, values that look like one, and the very values that the environment holds under such names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "[redacted]"

_NAME = re.compile(
    r"(pass(word|wd|phrase)?|secret(_?key|_?access_?key)?|credentials?|api_?key|access_?key(_?id)?|private_?key|signing_?key|auth(orization)?"
    r"|(^|_)token|bearer|sas_?url|connection_?string|cookie)$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?<=://)[^\s/@'\"]+@")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9+/])((AKIA|ASIA)[0-9A-Z]{16}"  # not inside base64: pictures in a report stay whole
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_\-]{16,}"
    r"|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|xox[abprs]-[A-Za-z0-9\-]{10,}|AIza[0-9A-Za-z_\-]{35})"
    r"|eyJ[A-Za-z0-9_\-]{8,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_QUERY = re.compile(
    r"(?<=[?&;\s])((?:x-amz-)?(?:signature|security-token|credential)|sig|token|password|api_?key|access_token|secret)"
    r"=[^&\s'\"]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"(?<![A-Za-z0-9_.\-])(?P<head>(?P<key>[A-Za-z0-9_.\-]+)[\"']?\s*[:=]\s*)(?P<quote>[\"']?)(?P<value>[^\s\"',;}\]&]+)(?P=quote)"
)
_SHORTEST = 6


def names_a_secret(name: str) -> bool:
    """Whether the last part of a dotted or upper-case name means a credential ("store.secret_key", "HF_TOKEN")."""
    return _NAME.search(name.rsplit(".", 1)[-1].replace("-", "_")) is not None


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of an environment that must appear nowhere: those under secret names (called at the border only)."""
    return tuple(value for name, value in environ.items() if names_a_secret(name) and len(value) >= _SHORTEST)


class Redactor:
    """Hides credentials in names, values and texts.

    Args:
        secrets: values known to be secret, whatever they look like.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({value for value in secrets if len(value) >= _SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def shapes(self, text: str) -> str:
        """Hide known secrets and what looks like a credential by itself, in any text."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _SHAPES.sub(HIDDEN, text)
        text = _USERINFO.sub(f"{HIDDEN}@", text)
        return _QUERY.sub(lambda found: f"{found.group(1)}={HIDDEN}", text)

    def value(self, name: str, value: Any) -> str:
        """The printable form of a setting, hidden when its name or its look says so. Booleans are never secret."""
        text = str(value)
        if text and value is not None and not isinstance(value, bool) and names_a_secret(name):
            return HIDDEN
        return self.shapes(text)

    def text(self, text: str) -> str:
        """Like `shapes`, and also `password: x`, `TOKEN=x` inside files such as YAML, JSON or a log."""

        def hide(found: re.Match[str]) -> str:
            quote, value = found["quote"], found["value"]
            plain = value.lower() in {"true", "false", "null", "none"} or value == HIDDEN
            hidden = names_a_secret(found["key"]) and not plain
            return f"{found['head']}{quote}{HIDDEN}{quote}" if hidden else found.group(0)

        return _ASSIGNED.sub(hide, self.shapes(text))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names; sequences stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat
