"""Settings of the data plane."""

from __future__ import annotations

from dataclasses import dataclass, field

from itpn_core.errors import ConfigError
from orchestrator.data.store import StoreConfig


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to an image after its crop, seeded by (seed, epoch, sample id)."""

    flip: float = field(default=0.5, metadata={"help": "probability of a horizontal flip"})
    brightness: float = field(default=0.0, metadata={"help": "brightness factor drawn from 1 +- this"})
    contrast: float = field(default=0.0, metadata={"help": "contrast factor drawn from 1 +- this"})
    saturation: float = field(default=0.0, metadata={"help": "saturation factor drawn from 1 +- this"})
    rand_ops: int = field(default=0, metadata={"help": "RandAugment operators per image; 0 = none, published: 2"})
    rand_magnitude: float = field(default=9.0, metadata={"help": "mean strength of RandAugment, 0 to 10"})
    rand_spread: float = field(default=0.5, metadata={"help": "standard deviation of that strength"})
    erase: float = field(default=0.0, metadata={"help": "probability of erasing a box; published fine-tuning: 0.25"})

    def __post_init__(self) -> None:
        for name in ("flip", "brightness", "contrast", "saturation", "erase"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"data.augment.{name}", value, "allowed are 0 <= value <= 1")
        if self.rand_ops < 0 or self.rand_spread < 0:
            name = "rand_ops" if self.rand_ops < 0 else "rand_spread"
            raise ConfigError(f"data.augment.{name}", getattr(self, name), "must not be negative")
        if not 0.0 <= self.rand_magnitude <= 10.0:
            raise ConfigError("data.augment.rand_magnitude", self.rand_magnitude, "allowed are 0 <= value <= 10")


@dataclass(frozen=True)
class CacheConfig:
    """On-disk cache of what was read from a remote store."""

    folder: str = field(default="", metadata={"help": "folder shared by all readers of a machine; empty = no cache"})
    gigabytes: float = field(default=50.0, metadata={"help": "size limit; the least recently used entries go first"})


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, in which order, and how they are read."""

    source: str = field(
        default="", metadata={"affects_result": False, "help": "folder, s3://, gs://, az:// or http(s) root; empty = the sample data"}
    )
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    val_split: str = field(default="val", metadata={"help": "split to evaluate on"})
    image_size: int = field(default=0, metadata={"help": "side of the square crops in pixels; 0 = model.img_size"})
    crop_scale: tuple[float, float] = field(default=(0.2, 1.0), metadata={"help": "area share of a random crop"})
    crop_ratio: tuple[float, float] = field(default=(0.75, 1.3333), metadata={"help": "width / height of a crop"})
    workers: int = field(default=0, metadata={"affects_result": False, "help": "decoding processes per training worker; 0 = one thread"})
    prefetch: int = field(default=4, metadata={"affects_result": False, "help": "batches decoded ahead, per process"})
    read_threads: int = field(default=8, metadata={"affects_result": False, "help": "ranged reads in flight, per process"})
    streams: int = field(default=16, metadata={"help": "logical streams of the order; at least the number of readers"})
    run: int = field(default=32, metadata={"help": "consecutive samples that are read with one request"})
    block_runs: int = field(default=16, metadata={"help": "runs from different places that are shuffled together"})
    last_batch: str = field(default="drop", metadata={"help": "drop or short: what happens to an incomplete batch"})
    memory_mb: int = field(default=1024, metadata={"affects_result": False, "help": "encoded bytes held ahead, per process, in MiB"})
    quarantine_budget: int = field(default=0, metadata={"help": "damaged samples tolerated before the run stops"})
    max_pixels: int = field(default=64_000_000, metadata={"help": "larger images are refused from their header"})
    max_member_mb: int = field(default=256, metadata={"help": "larger tar members are refused, in MiB"})
    augment: AugmentConfig = field(default_factory=AugmentConfig, metadata={"help": "flip, colour, RandAugment, erasing"})
    cache: CacheConfig = field(default_factory=CacheConfig, metadata={"affects_result": False, "help": "on-disk cache of remote reads"})
    store: StoreConfig = field(default_factory=StoreConfig, metadata={"affects_result": False, "help": "how the object store is reached"})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"data.{name}", value, f"it must be at least {least}")
        if self.last_batch not in ("drop", "short"):
            raise ConfigError("data.last_batch", self.last_batch, "allowed are 'drop' and 'short'")
        low, high = self.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ConfigError("data.crop_scale", self.crop_scale, "allowed are 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0.0 < low <= high:
            raise ConfigError("data.crop_ratio", self.crop_ratio, "allowed are 0 < low <= high")


_LEAST = {
    "image_size": 0, "workers": 0, "prefetch": 1, "read_threads": 1, "streams": 1, "run": 1, "block_runs": 1,
    "memory_mb": 1, "quarantine_budget": 0, "max_pixels": 1, "max_member_mb": 1,
}  # fmt: skip
