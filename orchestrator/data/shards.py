"""Writes a source as plain WebDataset tars with a manifest; the same source and options give the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import webdataset as wds

from orchestrator.data.errors import ManifestError, NotFoundError, SourceError
from orchestrator.data.index import scan_tar
from orchestrator.data.manifest import MANIFEST_NAME, Manifest, Shard
from orchestrator.data.progress import Progress
from orchestrator.data.sources import RawSample, Source, SourceSplit, UnreadableError, open_source, split_by_seed
from orchestrator.data.sources import shuffled as shuffled_numbers
from orchestrator.data.store import LocalStore, Store, StoreConfig, open_store

_LISTED = 20  # unreadable images that an error text or a summary names one by one
_THREADS = 4


@dataclass(frozen=True)
class ShardOptions:
    """What decides the bytes of the shards, besides the source."""

    val_fraction: float = field(default=0.1, metadata={"help": "share of the val split when the source has none"})
    seed: int = field(default=0, metadata={"help": "seed of the shuffle and of the train/val split"})
    shard_samples: int = field(default=5000, metadata={"help": "most samples in one shard"})
    shard_mb: int = field(default=256, metadata={"help": "a shard is closed when it has passed this size, in MiB"})
    max_unreadable: float = field(default=0.01, metadata={"help": "share of unreadable images that fails the job"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise SourceError(f"--val-fraction {self.val_fraction}: allowed are 0 <= fraction < 1")
        if self.shard_samples < 1 or self.shard_mb < 1:
            raise SourceError(
                f"--shard-samples {self.shard_samples} --shard-mb {self.shard_mb}: both must be at least 1"
            )
        if not 0.0 <= self.max_unreadable <= 1.0:
            raise SourceError(f"--max-unreadable {self.max_unreadable}: allowed are 0 <= share <= 1")


def make_shards(
    source_name: str,
    dest: str,
    options: ShardOptions,
    *,
    cache: Path,
    store_config: StoreConfig | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Turns a source into shards below `dest`, or verifies that they are already there.

    Args:
        source_name: a folder, `torchvision:NAME` or `fashion-mnist`.
        dest: local folder or s3://, gs://, az:// prefix.
        options: split, seed and shard size.
        cache: folder for downloaded sources.
        store_config: how to reach a remote `dest`.
        say: prints one line.

    Returns:
        The manifest that now lies at `dest`.

    Raises:
        DataError: the source is unusable, too many images are unreadable, or `dest` holds something else.
    """
    store = open_store(dest, store_config or StoreConfig())
    source = open_source(source_name, cache, say)
    recipe: dict[str, object] = {"name": source.name, "fingerprint": source.fingerprint, "options": asdict(options)}
    existing = _existing(store, dest)
    if existing is not None:
        _refuse_other(existing, recipe, dest)
        verify_objects(store, existing)
        say(f"already there, verified: {store.uri}")
        return existing
    writer = _Writer(store, options, say)
    numbers = _numbers(source, options)
    shards = {split: writer.split(source, split, numbers[split]) for split in numbers if len(numbers[split])}
    manifest = Manifest(source.classes, shards, recipe, tuple(writer.skipped), uri=dest)
    store.write(MANIFEST_NAME, manifest.to_bytes())  # last: a folder with a manifest is a whole data set
    return manifest


def summary(manifest: Manifest, where: str) -> str:
    """A few lines for the end of a job."""
    lines = [f"data set   {where}", f"classes    {len(manifest.classes)}"]
    for name, shards in manifest.splits.items():
        samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        lines.append(f"{name:<10} {samples:,} images in {len(shards)} shards, {size / 1e6:,.1f} MB")
    lines.append(f"unreadable {len(manifest.skipped)} skipped")
    lines += [f"           {name}: {reason}" for name, reason in manifest.skipped[:_LISTED]]
    if len(manifest.skipped) > _LISTED:
        lines.append(f"           and {len(manifest.skipped) - _LISTED} more, all listed in {MANIFEST_NAME}")
    return "\n".join([*lines, f"manifest   {manifest.fingerprint[:16]}"])


def verify_objects(store: Store, manifest: Manifest) -> None:
    """Compares every shard and index object with the manifest.

    Local shards are read whole (sha256); remote ones are compared by length and ETag, as reading them costs money:
    `jobs/index_shards.py --verify` reads those.

    Raises:
        ManifestError: an object differs.
        StoreError: an object is missing or cannot be read.
    """
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        info = store.head(shard.name)
        if info.nbytes != shard.bytes or (shard.etag and info.etag != shard.etag):
            raise ManifestError(
                f"{store.uri}/{shard.name} has {info.nbytes} bytes and version {info.etag!r}, the manifest says "
                f"{shard.bytes} and {shard.etag!r}: delete {MANIFEST_NAME} there and make the shards again"
            )
        if isinstance(store, LocalStore):
            with store.stream(shard.name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != shard.sha256:
                raise ManifestError(
                    f"{store.uri}/{shard.name} has another sha256 than the manifest says: it is damaged; "
                    f"delete {MANIFEST_NAME} there and make the shards again"
                )
        if google_crc32c.value(store.read(shard.index)) != shard.index_crc32c:
            raise ManifestError(
                f"{store.uri}/{shard.index} is not the index the manifest was made with; index it again"
            )


def _existing(store: Store, dest: str) -> Manifest | None:
    try:
        return Manifest.parse(store.read(MANIFEST_NAME), dest)
    except NotFoundError:
        return None


def _refuse_other(existing: Manifest, recipe: dict[str, object], dest: str) -> None:
    if existing.source == recipe:
        return
    differing = [key for key in recipe if existing.source.get(key) != recipe[key]]
    raise ManifestError(
        f"{dest} already holds shards of {existing.source.get('name', 'another source')!r} made with other "
        f"{' and '.join(differing)}; choose another DEST, or delete that folder to make it again"
    )


def _numbers(source: Source, options: ShardOptions) -> dict[str, npt.NDArray[np.int64]]:
    """Sample numbers of each split in the order of writing: shuffled, so that the first N are a sample."""
    if "val" in source.splits:
        return {name: shuffled_numbers(split.size, options.seed) for name, split in source.splits.items()}
    return split_by_seed(source.splits["train"], options.val_fraction, options.seed)


class _Writer:
    """Writes splits; gathers unreadable images and fails when they are too many."""

    def __init__(self, store: Store, options: ShardOptions, say: Callable[[str], None]) -> None:
        self._store, self._options, self._say = store, options, say
        self.skipped: list[tuple[str, str]] = []

    def split(self, source: Source, name: str, numbers: npt.NDArray[np.int64]) -> tuple[Shard, ...]:
        """Writes one split; returns its shards."""
        shards: list[Shard] = []
        # A val split cut from the train split reads the same images.
        images = source.splits[name] if name in source.splits else source.splits["train"]
        base = self._store.root if isinstance(self._store, LocalStore) else None
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".making-", dir=base))
        try:
            pattern = f"{str(staging).replace('%', '%%')}/{name}-%06d.tar"
            with (
                Progress(f"writing {name}", len(numbers)) as progress,
                wds.ShardWriter(
                    pattern,
                    maxcount=self._options.shard_samples,
                    maxsize=self._options.shard_mb << 20,
                    post=lambda path: shards.append(self._publish(Path(path))),
                    verbose=0,
                    mtime=0,  # an integer: a float makes tarfile add a PAX header of 1 KB to every member
                ) as writer,
            ):
                for number, sample in enumerate(self._readable(images, numbers, progress)):
                    key = f"{name}-{number:09d}"
                    writer.write({"__key__": key, sample.extension: sample.data, "cls": str(sample.label).encode()})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return tuple(shard for shard in shards if shard.samples)

    def _readable(self, split: SourceSplit, numbers: npt.NDArray[np.int64], progress: Progress) -> Iterator[RawSample]:
        """Readable samples in order, read ahead by a few threads (decoders release the interpreter)."""
        skipped = 0
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="make-shards") as pool:
            pending: deque[Future[RawSample]] = deque()
            for position in range(len(numbers) + 64):
                if position < len(numbers):
                    pending.append(pool.submit(split.read, int(numbers[position])))
                if position >= 64 and pending:
                    try:
                        yield pending.popleft().result()
                    except UnreadableError as error:
                        self.skipped.append((str(error.args[0]), str(error.args[1])))
                        skipped += 1
                    progress.advance()
        if skipped > self._options.max_unreadable * len(numbers):
            names = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:_LISTED])
            raise SourceError(
                f"{skipped} of {len(numbers)} images cannot be read, more than {self._options.max_unreadable:.0%} "
                f"(--max-unreadable): {names}"
            )

    def _publish(self, path: Path) -> Shard:
        with path.open("rb") as file:
            index = scan_tar(file, path.name)
        name = path.name
        info = self._store.write(name, path)
        data = replace(index, etag=info.etag).to_bytes()
        index_name = f"{name.removesuffix('.tar')}.idx"
        self._store.write(index_name, data)
        return Shard(name, index.samples, index.nbytes, index.sha256, info.etag, index_name, google_crc32c.value(data))
