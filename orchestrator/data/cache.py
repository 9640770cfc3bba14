"""On-disk cache of remote reads, shared by all readers of a machine; the least recently used entries go first.

Entries are named by content (the shard's checksum and the range), so a changed object can never be served from here.
Files appear by rename, so no reader sees half of one; a lock file serialises the book-keeping of several processes; and
what is read from the cache passes the same member checks as what comes from the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.data.config import CacheConfig
from orchestrator.data.store import LocalStore, Store

_EVICT_TO = 0.9  # share of the limit that is left after making room, so that not every write has to look at all files


class DiskCache:
    """A folder of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        (folder / "entries").mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self._folder / "entries" / name[:2] / name

    def get(self, key: str) -> bytes | None:
        """The entry, now the most recently used one; None when it is not there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Adds an entry and makes room for it; entries larger than the whole cache are not kept."""
        path = self._path(key)
        if len(data) > self._limit:
            return
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        with self._locked() as book:
            used = self._used(book)
            if used + len(data) > self._limit:
                used = self._evict(int(self._limit * _EVICT_TO) - len(data))
            before = path.stat().st_size if path.exists() else 0
            partial.write_bytes(data)
            partial.replace(path)
            book.seek(0)
            book.write(struct.pack("<Q", used + len(data) - before))
            book.flush()

    def drop(self, key: str) -> None:
        """Removes an entry that turned out to be damaged."""
        path = self._path(key)
        with self._locked() as book, contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            used = self._used(book)
            book.seek(0)
            book.write(struct.pack("<Q", max(0, used - size)))
            book.flush()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as book:
            fcntl.flock(book, fcntl.LOCK_EX)
            yield book  # closing the file gives the lock back, also when a process dies

    def _used(self, book: IO[bytes]) -> int:
        book.seek(0)
        raw = book.read(8)
        return int(struct.unpack("<Q", raw)[0]) if len(raw) == 8 else self._evict(self._limit)

    def _evict(self, keep: int) -> int:
        """Removes the oldest entries until at most `keep` bytes are left; returns how many are left."""
        entries = []
        for path in (self._folder / "entries").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if left <= keep:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left


class CachedStore:
    """Reads through an optional cache."""

    def __init__(self, store: Store, cache: DiskCache | None) -> None:
        self._store, self._cache = store, cache

    def read(self, name: str, *, content: str) -> bytes:
        """The whole object; `content` is a checksum that names its bytes."""
        key = f"{content}/whole"
        data = self._cache.get(key) if self._cache else None
        if data is None:
            data = self._store.read(name)
            if self._cache:
                self._cache.put(key, data)
        return data

    def read_range(self, name: str, start: int, length: int, etag: str, *, content: str, fresh: bool = False) -> bytes:
        """As `Store.read_range`; `fresh` forgets what the cache holds and asks the store."""
        key = f"{content}/{start}/{length}"
        if self._cache and fresh:
            self._cache.drop(key)
        data = self._cache.get(key) if self._cache and not fresh else None
        if data is None or len(data) != length:
            data = self._store.read_range(name, start, length, etag)
            if self._cache:
                self._cache.put(key, data)
        return data


def open_cached(store: Store, config: CacheConfig) -> CachedStore:
    """Puts the configured cache before a remote store; local files need none."""
    if not config.folder or isinstance(store, LocalStore):
        return CachedStore(store, None)
    return CachedStore(store, DiskCache(Path(config.folder).expanduser(), int(config.gigabytes * 1e9)))
