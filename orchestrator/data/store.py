"""One door to every object store: file, s3, gs, azure and http, with ranged reads that are right or raise.

Local files go through `os.pread`; everything else through obstore, which resumes a body that was cut. Credentials come
from the client's own chain (environment variables, web identity, container and instance roles); none passes through
our configuration.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol, cast

import obstore
import obstore.exceptions as obx
import obstore.store as obs

from orchestrator.data.errors import ChangedError, NotFoundError, ShortReadError, StoreError

_CHUNK = 8 << 20
_REFUSED = re.compile(r"40[13] (Forbidden|Unauthorized)")
# What the client says of replies that are well delivered but wrong: another range, no length, the whole object.
_BAD_REPLY = re.compile(r"Requested \d|Header missing|non-partial response|Range request not supported")


@dataclass(frozen=True)
class StoreConfig:
    """How to reach an object store. Credentials are not here: the client takes them from the environment."""

    endpoint: str = field(
        default="", metadata={"help": "URL of an S3-compatible server, e.g. http://127.0.0.1:8333; empty = the cloud's"}
    )
    region: str = field(default="", metadata={"help": "S3 region; empty = from the environment"})
    anonymous: bool = field(default=False, metadata={"help": "read a public bucket without signing requests"})
    connect_seconds: float = field(default=5.0, metadata={"help": "time allowed to open a connection"})
    read_seconds: float = field(default=10.0, metadata={"help": "longest silence of a server within a reply"})
    request_seconds: float = field(default=120.0, metadata={"help": "time allowed for one whole request"})
    retries: int = field(default=6, metadata={"help": "retries of a failed request before it is an error"})
    retry_seconds: float = field(default=60.0, metadata={"help": "no retry starts later than this"})
    give_up_s: float = field(
        default=600.0,
        metadata={
            "help": "how long training data may stay away or refused before the run fails; until then reads are tried"
            " again, with credentials read anew"
        },
    )


@dataclass(frozen=True)
class ObjectInfo:
    """Name below the store's root, length in bytes and version mark (empty for local files)."""

    name: str
    nbytes: int
    etag: str


class Store(Protocol):
    """Objects below one root. Names are relative paths with "/"; every method raises `StoreError` or a child of it."""

    uri: str

    def read(self, name: str) -> bytes:
        """The whole object."""

    def read_range(self, name: str, start: int, length: int, etag: str = "") -> bytes | memoryview:
        """Exactly `length` bytes from `start`, of the version `etag` when it is given."""

    def stream(self, name: str) -> IO[bytes]:
        """The object as a stream from its first byte; ends early only by raising."""

    def head(self, name: str) -> ObjectInfo:
        """Length and version mark."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose names start with the folder `prefix`, sorted by name."""

    def write(self, name: str, data: bytes | Path) -> ObjectInfo:
        """Writes an object whole or not at all."""


def open_store(uri: str, config: StoreConfig) -> Store:
    """Opens the store that holds `uri`.

    Args:
        uri: a path, `file://`, `s3://bucket/prefix`, `gs://`, `az://`/`abfs://`, or `http(s)://` prefix.
        config: endpoints and time limits.

    Raises:
        StoreError: the scheme is unknown or the client refuses the configuration.
    """
    scheme = urllib.parse.urlsplit(uri).scheme if "://" in uri else "file"
    if scheme == "file":
        return LocalStore(uri)
    if scheme not in ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https"):
        raise StoreError(f"{uri}: scheme {scheme!r} is not known; use a path, s3://, gs://, az://, http:// or https://")
    return RemoteStore(uri.rstrip("/"), config)


class _Descriptor:
    """An open file that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalStore:
    """A folder. Reads are positioned reads on open files, so threads share them without a lock."""

    _MAX_OPEN = 64

    def __init__(self, uri: str) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(uri).path) if uri.startswith("file://") else uri
        self.root = Path(path).expanduser().absolute()
        self.uri = str(self.root)
        self._open: dict[str, _Descriptor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.uri,)

    def _path(self, name: str) -> Path:
        path = self.root / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise StoreError(f"object name {name!r} leaves {self.root}; refused")
        return path

    def _file(self, name: str) -> _Descriptor:
        with self._lock:
            file = self._open.pop(name, None)
            if file is None:
                file = cast(_Descriptor, self._guard(name, lambda: _Descriptor(self._path(name))))
            self._open[name] = file
            if len(self._open) > self._MAX_OPEN:  # the oldest; a thread still reading keeps it alive until it is done
                self._open.pop(next(iter(self._open)))
            return file

    def _guard(self, name: str, call: Any) -> Any:
        try:
            return call()
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.root / name}: no such file") from error
        except OSError as error:
            raise StoreError(f"{self.root / name}: {error.strerror or error}") from error

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        return cast(bytes, self._guard(name, self._path(name).read_bytes))

    def read_range(self, name: str, start: int, length: int, etag: str = "") -> bytes:
        """As `Store.read_range`."""
        file = self._file(name)
        data = cast(bytes, self._guard(name, lambda: os.pread(file.number, length, start)))
        if len(data) != length:
            got = f"{len(data)} of {length} bytes at offset {start}"
            raise ShortReadError(f"{self.root / name}: {got}: the file is cut")
        return data

    def stream(self, name: str) -> IO[bytes]:
        """As `Store.stream`."""
        return cast(IO[bytes], self._guard(name, lambda: self._path(name).open("rb")))

    def head(self, name: str) -> ObjectInfo:
        """As `Store.head`."""
        return ObjectInfo(name, self._guard(name, self._path(name).stat).st_size, "")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """As `Store.list`."""
        base = self._path(prefix) if prefix else self.root
        found = (path for path in base.rglob("*") if path.is_file())
        return sorted(
            (ObjectInfo(path.relative_to(self.root).as_posix(), path.stat().st_size, "") for path in found),
            key=lambda info: info.name,
        )

    def write(self, name: str, data: bytes | Path) -> ObjectInfo:
        """As `Store.write`."""
        target = self._path(name)
        self._guard(name, lambda: target.parent.mkdir(parents=True, exist_ok=True))
        if isinstance(data, Path):
            self._guard(name, lambda: data.replace(target))
        else:
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            self._guard(name, lambda: (partial.write_bytes(data), partial.replace(target)))
        return self.head(name)


class RemoteStore:
    """A prefix of a bucket or of an http server, through obstore."""

    def __init__(self, uri: str, config: StoreConfig) -> None:
        self.uri = uri
        self._config = config
        try:
            self._store = open_client(uri, config)
        except (obx.BaseError, ValueError) as error:
            raise StoreError(f"{uri}: the storage client refuses this address: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str, StoreConfig]]:
        return RemoteStore, (self.uri, self._config)

    def _guard(self, name: str, call: Any) -> Any:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            return call()
        except FileNotFoundError as error:
            raise _missing(where, self.uri, error) from error
        except obx.PreconditionError as error:
            raise ChangedError(
                f"{where}: the object has changed since the manifest was written; index it again with "
                "jobs/index_shards.py, or restore it"
            ) from error
        except (obx.BaseError, OSError, ValueError) as error:
            if "NoSuchBucket" in str(error):
                raise _missing(where, self.uri, error) from error
            if _BAD_REPLY.search(str(error)):
                raise ShortReadError(f"{where}: not the bytes that were asked for: {_first_line(error)}") from error
            raise StoreError(_explain(where, error)) from error

    def read(self, name: str) -> bytes:
        """As `Store.read`."""
        return cast(bytes, self._guard(name, lambda: bytes(obstore.get(self._store, name).bytes())))

    def read_range(self, name: str, start: int, length: int, etag: str = "") -> memoryview:
        """As `Store.read_range`: a view of the client's own buffer, not copied."""
        options: dict[str, Any] = {"range": (start, start + length)}
        if etag:
            options["if_match"] = etag
        data = cast(
            memoryview,
            self._guard(
                f"{name}, offset {start}",
                lambda: memoryview(obstore.get(self._store, name, options=cast(Any, options)).bytes()),
            ),
        )
        if len(data) != length:
            raise ShortReadError(f"{self.uri}/{name}: {len(data)} of {length} bytes at offset {start}: a short reply")
        return data

    def stream(self, name: str) -> IO[bytes]:
        """As `Store.stream`."""
        return cast(IO[bytes], _RemoteStream(self, name))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The object in pieces of about 8 MB, all of one version; a short body raises."""
        info = self.head(name)
        for start in range(0, info.nbytes, _CHUNK):
            yield self.read_range(name, start, min(_CHUNK, info.nbytes - start), info.etag)

    def head(self, name: str) -> ObjectInfo:
        """As `Store.head`."""
        meta = self._guard(name, lambda: obstore.head(self._store, name))
        return ObjectInfo(name, meta["size"], meta["e_tag"] or "")

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """As `Store.list`."""
        batches = self._guard("", lambda: list(obstore.list(self._store, prefix or None)))
        found = (ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "") for batch in batches for meta in batch)
        return sorted(found, key=lambda info: info.name)

    def write(self, name: str, data: bytes | Path) -> ObjectInfo:
        """As `Store.write`."""
        self._guard(name, lambda: obstore.put(self._store, name, data))
        if isinstance(data, Path):
            data.unlink()
        return self.head(name)


class _RemoteStream:
    """File-like reader over `RemoteStore.chunks`, for tar scanning."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self._chunks = store.chunks(name)
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """As `Store.read`."""
        parts: list[bytes] = []
        want = size if size >= 0 else 1 << 62
        while want:
            if not self._rest:
                self._rest = next(self._chunks, memoryview(b""))
                if not self._rest:
                    break
            piece, self._rest = self._rest[:want], self._rest[want:]
            parts.append(bytes(piece))
            want -= len(piece)
        return b"".join(parts)

    def close(self) -> None:
        self._chunks.close()  # type: ignore[attr-defined]

    def __enter__(self) -> _RemoteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_client(uri: str, config: StoreConfig) -> obs.ObjectStore:
    """An obstore client with our time limits, retries and endpoint; raises obstore's own errors."""
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=config.connect_seconds),
        "read_timeout": timedelta(seconds=config.read_seconds),
        "timeout": timedelta(seconds=config.request_seconds),
        "allow_http": uri.startswith("http://") or config.endpoint.startswith("http://"),
    }
    retry: dict[str, Any] = {
        "max_retries": config.retries,
        "retry_timeout": timedelta(seconds=config.retry_seconds),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    extra: dict[str, Any] = {}
    if uri.startswith("s3"):
        if config.endpoint:
            extra["endpoint"] = config.endpoint
        if config.region:
            extra["region"] = config.region
        if config.anonymous:
            extra["skip_signature"] = True
    if uri.startswith(("http://", "https://")):
        return obs.HTTPStore.from_url(uri, client_options=cast(Any, client), retry_config=cast(Any, retry))
    return obs.from_url(uri, client_options=cast(Any, client), retry_config=cast(Any, retry), **extra)


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).split("\n\nDebug source", 1)[0]).strip()[:300]


def _missing(where: str, uri: str, error: Exception) -> NotFoundError:
    if "NoSuchBucket" in str(error):
        return NotFoundError(f"{uri}: there is no such bucket; check the name, the region and the endpoint")
    return NotFoundError(f"{where}: no such object")


def is_refusal(error: BaseException) -> bool:
    """Whether a server said that these credentials may not do this; of a list it comes as a general error."""
    kinds = obx.UnauthenticatedError | obx.PermissionDeniedError
    return isinstance(error, kinds) or _REFUSED.search(str(error)) is not None


def reason(error: BaseException) -> str:
    """Why an object store did not do what it was asked, in words that say what to check."""
    text = str(error)
    if "error sending request" in text or "ConnectError" in text:
        return f"the server cannot be reached; check the endpoint and the network ({_first_line(error)[-160:]})"
    if is_refusal(error):
        return (
            "access refused; check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the role of this "
            "machine) and the bucket's policy"
        )
    if "169.254.169.254" in text:
        return "no credentials were found in the environment, and this machine has no role that provides any"
    return _first_line(error) or type(error).__name__


def _explain(where: str, error: Exception) -> str:
    return f"{where}: {reason(error)}"
