"""Binary index of one shard: where every member lies and the crc32c of its bytes.

Layout, little-endian: the 64-byte header, a line of JSON (extension names, version mark of the tar in its store,
largest label), one 24-byte row per member, and the crc32c of all that. A reader fetches it only for shards it opens,
and never has to parse a tar while training.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, cast

import google_crc32c
import numpy as np
import numpy.typing as npt
import webdataset.tariterators as wds_tar

from orchestrator.data.errors import IntegrityError

MAGIC = b"ITPNIDX1"
_HEADER = struct.Struct("<8s32sQIII4x")  # magic, sha256 of the shard, its bytes, samples, members, bytes of JSON
_BLOCK = 512  # tar block
MEMBER = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4"), ("sample", "<u4"), ("field", "<u2"), ("pad", "<u2")]
)
_META = re.compile(r"^__[^/]*__($|/)")  # WebDataset's own mark for members that are not samples


@dataclass(frozen=True)
class ShardIndex:
    """Members of one shard in tar order.

    Attributes:
        sha256: hex digest of the whole shard.
        nbytes: length of the whole shard.
        fields: extension names (`jpg`, `cls`), indexed by the rows' `field`.
        members: rows of `MEMBER`; `sample` counts from 0 in tar order.
        first: int64 [samples + 1], first row of each sample.
        etag: the store's version mark of the tar that was read; empty for local files.
        top_label: largest number in a `cls` member; -1 when there is none.
    """

    sha256: str
    nbytes: int
    fields: tuple[str, ...]
    members: npt.NDArray[np.void]
    first: npt.NDArray[np.int64]
    etag: str = ""
    top_label: int = -1

    @property
    def samples(self) -> int:
        """Number of samples in the shard."""
        return len(self.first) - 1

    def rows(self, sample: int) -> npt.NDArray[np.void]:
        """Rows of one sample."""
        return self.members[self.first[sample] : self.first[sample + 1]]

    def incomplete(self, wanted: tuple[frozenset[str], ...]) -> npt.NDArray[np.int64]:
        """Samples that lack a field of one of the wanted groups (image, label); int64 sample numbers."""
        bad = np.zeros(self.samples, dtype=bool)
        for group in wanted:
            codes = [code for code, name in enumerate(self.fields) if name in group]
            has = np.zeros(self.samples, dtype=bool)
            has[self.members["sample"][np.isin(self.members["field"], codes)]] = True
            bad |= ~has
        return np.flatnonzero(bad)

    def to_bytes(self) -> bytes:
        """Serialised form; `from_bytes` reads it back."""
        about = {"fields": list(self.fields), "etag": self.etag, "top_label": self.top_label}
        names = json.dumps(about).encode()
        header = _HEADER.pack(
            MAGIC, bytes.fromhex(self.sha256), self.nbytes, self.samples, len(self.members), len(names)
        )
        body = header + names + self.members.tobytes()
        return body + struct.pack("<I", google_crc32c.value(body))

    @staticmethod
    def from_bytes(data: bytes, where: str) -> ShardIndex:
        """Reads an index.

        Args:
            data: the whole index object.
            where: its name, for error texts.

        Raises:
            IntegrityError: the object is cut, damaged, or of another format.
        """
        if len(data) < _HEADER.size + 4 or data[:8] != MAGIC:
            raise IntegrityError(f"{where}: not a shard index ({len(data)} bytes); build it with jobs/index_shards.py")
        if google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise IntegrityError(f"{where}: the index is damaged or cut; rebuild it with jobs/index_shards.py")
        _, sha256, nbytes, samples, members, name_bytes = _HEADER.unpack_from(data)
        about = json.loads(data[_HEADER.size : _HEADER.size + name_bytes])
        if not isinstance(about, dict):
            raise IntegrityError(f"{where}: the index was made by an earlier version; delete it and make it again")
        rows = np.frombuffer(data, dtype=MEMBER, count=members, offset=_HEADER.size + name_bytes)
        first = _first_rows(rows, samples)
        fields = tuple(about["fields"])
        return ShardIndex(sha256.hex(), nbytes, fields, rows, first, about["etag"], about["top_label"])


def _first_rows(members: npt.NDArray[np.void], samples: int) -> npt.NDArray[np.int64]:
    return np.searchsorted(members["sample"], np.arange(samples + 1)).astype(np.int64)


class _Tap(io.RawIOBase):
    """Passes a stream on while counting and hashing it, and remembers where its last byte that is not zero lay."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.nbytes = 0
        self.end_of_content = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        if content := data.rstrip(b"\0"):
            self.end_of_content = self.nbytes + len(content)
        self.nbytes += len(data)
        return data


def scan_tar(stream: IO[bytes], where: str, etag: str = "", max_member: int = 1 << 30) -> ShardIndex:
    """Reads a whole tar once and builds its index.

    Samples are grouped as WebDataset groups them: consecutive members whose names agree up to the first dot.

    Args:
        stream: the shard from its first byte; read to its end, never seeked.
        where: name of the shard, for error texts.
        etag: version mark of the tar, kept in the index.
        max_member: largest allowed member in bytes.

    Raises:
        IntegrityError: the tar is cut (also at a member boundary), a member is oversized or a name is unsafe, or a
            sample has the same field twice.
    """
    tap = _Tap(stream)
    rows: list[tuple[int, int, int, int, int, int]] = []
    fields: dict[str, int] = {}
    key, sample, seen, top_label = None, -1, set[str](), -1
    for member_key, field, offset, data in _members(tap, where, max_member):
        if member_key != key:
            key, sample, seen = member_key, sample + 1, set()
        if field in seen:
            raise IntegrityError(f"{where}: sample {member_key!r} has the field {field!r} twice")
        seen.add(field)
        if field == "cls" and data.strip().isdigit():
            top_label = max(top_label, int(data))
        code = fields.setdefault(field, len(fields))
        rows.append((offset, len(data), google_crc32c.value(data), sample, code, 0))
    members = np.array(rows, dtype=MEMBER)
    first = _first_rows(members, sample + 1)
    return ShardIndex(tap.sha256.hexdigest(), tap.nbytes, tuple(fields), members, first, etag, top_label)


def _members(tap: _Tap, where: str, max_member: int) -> Iterator[tuple[str, str, int, bytes]]:
    """Key, field, offset and bytes of every sample member."""
    end = 0
    try:
        with tarfile.open(fileobj=cast(IO[bytes], tap), mode="r|") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                _refuse_unsafe(info, where, max_member)
                key, field = wds_tar.base_plus_ext(info.name)
                if not info.isreg() or key is None or _META.match(info.name):
                    continue
                body = tar.extractfile(info)
                data = body.read() if body is not None else b""
                if len(data) != info.size:
                    raise IntegrityError(
                        f"{where}: member {info.name!r} at offset {info.offset_data} is cut: "
                        f"{len(data)} of {info.size} bytes"
                    )
                yield key, field.lower(), info.offset_data, data
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        raise IntegrityError(f"{where}: not a whole tar file ({error}) near offset {tap.nbytes}") from error
    while tap.read(1 << 20):
        pass
    # tarfile ends quietly at a damaged header and at a cut between members; only zeros up to the end mark are right.
    if tap.end_of_content > end:
        raise IntegrityError(f"{where}: the tar header at offset {end} is damaged; write the shard again")
    if tap.nbytes % _BLOCK or tap.nbytes < end + 2 * _BLOCK:
        raise IntegrityError(f"{where}: the tar has no end mark after {tap.nbytes} bytes: it is cut; write it again")


def _refuse_unsafe(info: tarfile.TarInfo, where: str, max_member: int) -> None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name or "\0" in info.name:
        raise IntegrityError(f"{where}: member name {info.name!r} leaves the archive; such tars are refused")
    if not (info.isreg() or info.isdir()):
        raise IntegrityError(f"{where}: member {info.name!r} is a link or a device; only plain files are accepted")
    if info.size > max_member:
        raise IntegrityError(f"{where}: member {info.name!r} has {info.size} bytes, allowed are {max_member}")
