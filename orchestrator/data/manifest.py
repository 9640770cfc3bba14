"""`index.json`: what a data set is (classes, splits, shards, counts, checksums), read once by the driver."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data.errors import ManifestError, NotFoundError, StoreError
from orchestrator.data.patterns import select, split_pattern
from orchestrator.data.store import Store, StoreConfig, open_store

FORMAT = "itpn-shards"
VERSION = 1
MANIFEST_NAME = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar and its index object.

    Attributes:
        name: path of the tar below the data set's root.
        samples: number of samples.
        bytes: length of the tar.
        sha256: hex digest of the tar.
        etag: the store's version mark when the manifest was written; empty for local files.
        index: path of the index object below the root of the manifest.
        index_crc32c: crc32c of the index object.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    etag: str
    index: str
    index_crc32c: int


@dataclass(frozen=True)
class Split:
    """One split: shards in manifest order. Sample id = position in that order, int64.

    Attributes:
        name: "train", "val", ...
        shards: in manifest order.
        classes: class names; a label is an index into them.
        uri: root of the tars.
        index_uri: root of the index objects (another prefix when the bucket is read-only).
    """

    name: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    uri: str
    index_uri: str

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First sample id of each shard, and the number of samples last; int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    def locate(self, ids_B: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shard number and sample number in that shard of each id; two int64 [B]."""
        shard_B = np.searchsorted(self.starts, ids_B, side="right") - 1
        return shard_B, ids_B - self.starts[shard_B]


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        classes: class names in label order.
        splits: shards of each split, by name.
        source: what the shards were made from and with which options.
        skipped: images that could not be read when the shards were made: name and reason.
        shard_uri: root of the tars when they lie elsewhere than the manifest, else empty.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    source: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    shard_uri: str = ""
    uri: str = ""

    @staticmethod
    def load(uri: str, store_config: StoreConfig | None = None) -> Manifest:
        """Reads `index.json` below `uri` (a folder, s3://, gs://, az:// or http(s):// prefix).

        A brace pattern or glob behind the last folder (`s3://b/p/train-{000000..000007}.tar`) selects shards.

        Raises:
            StoreError: the store cannot be reached or refused us.
            ManifestError: there is no manifest, or it is not one of ours.
        """
        root, pattern = split_pattern(uri)
        store = open_store(root, store_config or StoreConfig())
        try:
            text = store.read(MANIFEST_NAME)
        except NotFoundError as error:
            if "no such bucket" in str(error):
                raise
            raise ManifestError(_no_manifest(store, root)) from error
        manifest = Manifest.parse(text, root)
        return manifest.only(pattern) if pattern else manifest

    @staticmethod
    def parse(text: bytes, uri: str) -> Manifest:
        """Reads a manifest's bytes; `uri` is where they came from."""
        where = f"{uri.rstrip('/')}/{MANIFEST_NAME}"
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise ManifestError(f"{where}: format is {raw['format']!r}, expected {FORMAT!r}")
            if raw["version"] != VERSION:
                raise ManifestError(f"{where}: version {raw['version']!r} is not known here (known: {VERSION})")
            return Manifest(
                classes=tuple(raw["classes"]),
                splits={name: tuple(Shard(**shard) for shard in split) for name, split in raw["splits"].items()},
                source=raw.get("source", {}),
                skipped=tuple((name, reason) for name, reason in raw.get("skipped", [])),
                shard_uri=raw.get("shard_uri", ""),
                uri=uri,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{where} is not a manifest of this project ({type(error).__name__}: {error}); "
                "for plain WebDataset tars run jobs/index_shards.py first"
            ) from error

    def only(self, pattern: str) -> Manifest:
        """The same data set with the shards that a brace pattern or glob names.

        Raises:
            ManifestError: a name that the pattern lists is not in the manifest, or nothing matches.
        """
        names = [shard.name for shards in self.splits.values() for shard in shards]
        try:
            chosen = set(select(names, pattern))
        except LookupError as error:
            raise ManifestError(f"{self.uri}: {error.args[0]}") from error
        splits = {name: tuple(s for s in shards if s.name in chosen) for name, shards in self.splits.items()}
        return replace(self, splits=splits)

    def to_bytes(self) -> bytes:
        """The JSON text, the same bytes for the same content."""
        raw = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(self.classes),
            "splits": {name: [asdict(shard) for shard in shards] for name, shards in self.splits.items()},
            "source": self.source,
            "skipped": [list(entry) for entry in self.skipped],
            "shard_uri": self.shard_uri,
        }
        return (json.dumps(raw, indent=1) + "\n").encode()

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of classes, shard contents and their order: equal for equal samples, wherever they lie."""
        content = [[name, [(s.sha256, s.samples) for s in shards]] for name, shards in sorted(self.splits.items())]
        return hashlib.sha256(json.dumps([self.classes, content]).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            ManifestError: there is no such split, or it has no samples.
        """
        if name not in self.splits:
            raise ManifestError(f"{self.uri} has no split {name!r}; it has: {', '.join(self.splits) or 'none'}")
        split = Split(name, self.splits[name], self.classes, self.shard_uri or self.uri, self.uri)
        if split.samples == 0:
            raise ManifestError(f"{self.uri}: the split {name!r} is empty; nothing could be read from it")
        return split


def _no_manifest(store: Store, root: str) -> str:
    text = f"no data set at {root}: {MANIFEST_NAME} is not there"
    try:
        tars = [info.name for info in store.list() if info.name.endswith(".tar")]
    except StoreError:  # plain http servers list nothing
        tars = []
    if tars:
        return f"{text}, but {len(tars)} tars are; index them with jobs/index_shards.py {root}"
    return f"{text}, nor any tar; make shards with jobs/make_shards.py SOURCE {root}, or check the address"
