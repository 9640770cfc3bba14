"""A writable folder that is either a local directory or a prefix in an object store.

Runs (checkpoints, journals, run records) are written through this one door: the same code serves a laptop's disk
and a bucket. Reading of training data, which needs retries and integrity checks, is in the modules beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from orchestrator.data.errors import DataError
from orchestrator.data.store import StoreConfig, is_refusal, open_client, reason

T = TypeVar("T")


class StorageError(DataError):
    """Storage cannot be reached or refuses; the message names the place and what to check."""


class Folder:
    """Objects under one URI.

    Args:
        uri: `/absolute/path`, `file:///path`, `s3://bucket/prefix`, `gs://…` or `az://…`. Credentials come from the
            environment's standard chain.
        config: endpoint and time limits of an object store.

    Raises:
        StorageError: the URI cannot be understood or a local directory cannot be made.
    """

    def __init__(self, uri: str, config: StoreConfig | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._config = config or StoreConfig()
        self._store: Any = _open(self.uri, self._config)

    def _ask(self, call: Callable[[Any], T]) -> T:
        """One request. A refusal is answered by a new client: this one would keep credentials that were withdrawn."""
        try:
            return call(self._store)
        except BaseError as error:
            if self.local_path() is not None or not is_refusal(error):
                raise
            self._store = _open(self.uri, self._config)
            return call(self._store)

    def put(self, key: str, data: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """Writes one object atomically: a reader sees all of it or nothing.

        Returns:
            False when `only_if_absent` and the object was there already; it is left as it was.
        """
        try:
            self._ask(lambda store: store.put(key, data, mode="create" if only_if_absent else "overwrite"))
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot write {self.uri}/{key}: {reason(error)}") from error
        return True

    def get(self, key: str) -> bytes:
        """Reads one object.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: anything else.
        """
        try:
            return self._ask(lambda store: bytes(store.get(key).bytes()))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{key}") from None
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot read {self.uri}/{key}: {reason(error)}") from error

    def download(self, key: str, destination: Path) -> None:
        """Streams one object into a local file; raises as `get`."""
        try:
            with destination.open("wb") as file:
                for chunk in self._ask(lambda store: store.get(key)):
                    file.write(chunk)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{key}") from None
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot read {self.uri}/{key}: {reason(error)}") from error

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self._ask(lambda store: store.head(key))
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot reach {self.uri}/{key}: {reason(error)}") from error
        return True

    def modified(self, key: str) -> float:
        """When the object was written, in Unix seconds of the storage's own clock; raises as `get`."""
        try:
            return self._ask(lambda store: float(store.head(key)["last_modified"].timestamp()))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{key}") from None
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot reach {self.uri}/{key}: {reason(error)}") from error

    def names(self, prefix: str = "") -> list[str]:
        """Names directly below `prefix` (folders without a trailing slash), sorted."""
        try:
            listed = self._ask(lambda store: store.list_with_delimiter(f"{prefix}/" if prefix else None))
        except FileNotFoundError:
            return []
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot list {self.uri}/{prefix}: {reason(error)}") from error
        paths = [*listed["common_prefixes"], *(item["path"] for item in listed["objects"])]
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; what is not there is no error."""
        for key in keys:
            try:
                self._remove(key)
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise StorageError(f"cannot delete {self.uri}/{key}: {reason(error)}") from error

    def _remove(self, key: str) -> None:
        self._ask(lambda store: store.delete(key))

    def delete_tree(self, prefix: str) -> None:
        """Removes every object below `prefix`, and the empty local directory that is left."""
        try:
            keys = self._ask(lambda store: [item["path"] for batch in store.list(f"{prefix}/") for item in batch])
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot list {self.uri}/{prefix}: {reason(error)}") from error
        self.delete(keys)
        path = self.local_path(prefix)
        if path is not None and path.is_dir() and not any(path.iterdir()):
            path.rmdir()

    def remote(self) -> tuple[str, ...]:
        """How a command names a folder on an object store: URI and endpoint; () where it is on this machine's disk."""
        if self.local_path() is not None:
            return ()
        return (self.uri, "--endpoint", self._config.endpoint) if self._config.endpoint else (self.uri,)

    def local_path(self, key: str = "") -> Path | None:
        """Where an object lies on this machine's disk; None for an object store."""
        scheme = urlsplit(self.uri).scheme
        if scheme not in ("", "file"):
            return None
        base = Path(self.uri.removeprefix("file://"))
        return base / key if key else base


def _open(uri: str, config: StoreConfig) -> Any:
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("", "file"):
            return LocalStore(Path(uri.removeprefix("file://")).expanduser(), mkdir=True)
        return open_client(uri, config)
    except (BaseError, OSError, ValueError) as error:
        raise StorageError(
            f"cannot open {uri!r}: {reason(error)}. Use a path, file://, s3://, gs:// or az://"
        ) from error
