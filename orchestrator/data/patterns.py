"""Brace patterns and globs in the address of shards."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

import webdataset.shardlists as wds_lists

_SPECIAL = re.compile(r"[{*?\[]")


def split_pattern(uri: str) -> tuple[str, str]:
    """Cuts `s3://b/p/train-{000..007}.tar` into the folder `s3://b/p` and the pattern; no pattern gives ''."""
    found = _SPECIAL.search(uri)
    if found is None or ("://" not in uri and Path(uri).expanduser().is_dir()):  # a folder may be called "a[1]"
        return uri, ""
    folder = uri[: found.start()].rfind("/")
    return (uri[:folder], uri[folder + 1 :]) if folder >= 0 else (".", uri)


def select(names: Sequence[str], pattern: str) -> list[str]:
    """Names that the pattern selects, in the order of `names`.

    Raises:
        LookupError: nothing matches, or a brace pattern lists a name that is not there.
    """
    known = set(names)
    chosen: set[str] = set()
    for part in wds_lists.expand_urls(pattern):
        found = {name for name in known if fnmatch.fnmatchcase(name, part)} if _SPECIAL.search(part) else {part} & known
        if not found:
            raise LookupError(f"no shard matches {part!r}; there are {len(known)} shards, such as {sorted(known)[:2]}")
        chosen |= found
    return [name for name in names if name in chosen]
