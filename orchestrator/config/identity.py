"""What a configuration is, as far as results go: the fields that decide them, and a hash of those."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from orchestrator.config.schema import flat_values, leaves


def result_fields(config: Any, manifest_hash: str) -> dict[str, Any]:
    """Settings that decide the result, by dotted key; the data counts by content, not by place.

    Tuples become lists, as they do in the stored record.
    """
    values = flat_values(config)
    fields = {leaf.key: values[leaf.key] for leaf in leaves(type(config)) if leaf.affects_result}
    return json.loads(json.dumps({**fields, "data.manifest": manifest_hash}))  # type: ignore[no-any-return]


def fingerprint(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields; its first 8 hex digits end a default run name."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
