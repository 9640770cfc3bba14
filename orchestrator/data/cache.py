"""On-disk cache of remote reads, shared by all readers of a machine; the least recently used entries go first.

Entries are named by content (the shard's checksum and the range), so a changed object can never be served from here.
Files appear by rename, so no reader sees half of one; a lock file serialises the book-keeping of several processes; and
what is read from the cache passes the same member checks as what comes from the store. A disk that takes no more is no
error: the cache gives back half of what it holds each time, down to nothing, and reading goes on without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.data.config import CacheConfig
from orchestrator.data.errors import DataError
from orchestrator.data.store import LocalStore, Store

_log = logging.getLogger(__name__)
_EVICT_TO = 0.9  # share of the limit that is left after making room, so that not every write has to look at all files


class DiskCache:
    """A folder of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._gave_way = False
        try:
            (folder / "entries").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache.folder={folder} cannot be used ({error.strerror}); give a folder on a local disk that "
                "this user may write, or leave it empty for no cache"
            ) from error

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self._folder / "entries" / name[:2] / name

    def get(self, key: str) -> bytes | None:
        """The entry, now the most recently used one; None when it is not there or cannot be read."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or a disk that has become read-only
            os.utime(path)
        return data

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Adds an entry and makes room for it; entries larger than the whole cache are not kept."""
        if len(data) > self._limit:
            return
        try:
            with self._locked() as book:
                self._add(book, self._path(key), data)
        except OSError as error:
            self._give_way(error)

    def _add(self, book: IO[bytes], path: Path, data: bytes | memoryview) -> None:
        used = self._used(book)
        if used + len(data) > self._limit:
            used = self._evict(int(self._limit * _EVICT_TO) - len(data))
        before = path.stat().st_size if path.exists() else 0
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._note(book, used + len(data) - before)

    def _give_way(self, error: OSError) -> None:
        """The disk takes no more: whoever else writes there needs the room more than a cache does."""
        if not self._gave_way:
            self._gave_way = True
            _log.warning(
                "data.cache.folder=%s takes no more (%s): the cache gives room back and reading goes on without it; "
                "free some space or lower data.cache.gigabytes", self._folder, error.strerror or error
            )  # fmt: skip
        with contextlib.suppress(OSError), self._locked() as book:
            self._note(book, self._evict(self._used(book) // 2))

    def drop(self, key: str) -> None:
        """Removes an entry that turned out to be damaged."""
        path = self._path(key)
        with contextlib.suppress(OSError), self._locked() as book:
            size = path.stat().st_size
            path.unlink()
            self._note(book, max(0, self._used(book) - size))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as book:
            fcntl.flock(book, fcntl.LOCK_EX)
            yield book  # closing the file gives the lock back, also when a process dies

    @staticmethod
    def _note(book: IO[bytes], used: int) -> None:
        book.seek(0)
        book.write(struct.pack("<Q", used))
        book.flush()

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

    def read(self, name: str, *, content: str, fresh: bool = False) -> bytes:
        """The whole object; `content` is a checksum that names its bytes, `fresh` as in `read_range`."""
        key = f"{content}/whole"
        if self._cache and fresh:
            self._cache.drop(key)
        data = self._cache.get(key) if self._cache and not fresh else None
        if data is None:
            data = self._store.read(name)
            if self._cache:
                self._cache.put(key, data)
        return data

    def read_range(
        self, name: str, start: int, length: int, etag: str, *, content: str, fresh: bool = False
    ) -> bytes | memoryview:
        """As `Store.read_range`; `fresh` forgets what the cache holds and asks the store."""
        key = f"{content}/{start}/{length}"
        if self._cache and fresh:
            self._cache.drop(key)
        data: bytes | memoryview | None = self._cache.get(key) if self._cache and not fresh else None
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
