"""Where images for `make_shards` come from: a folder, a torchvision data set, or the built-in Fashion-MNIST."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torchvision
from PIL import Image

from itpn_core.errors import nearest
from itpn_core.random import stream_keys_numpy
from orchestrator.data import fashion
from orchestrator.data.decode import decode_rgb
from orchestrator.data.errors import IntegrityError, SourceError

_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_CONVERTED = {".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "val"}


@dataclass(frozen=True)
class RawSample:
    """One encoded image: name for reports, label, file extension, bytes."""

    name: str
    label: int
    extension: str
    data: bytes


class UnreadableError(Exception):
    """One image of a source cannot be read; args are its name and the reason."""


@dataclass(frozen=True)
class SourceSplit:
    """Random access to one split; `read(i)` gives a `RawSample` or raises `UnreadableError`."""

    size: int
    read: Callable[[int], RawSample]


@dataclass(frozen=True)
class Source:
    """A labelled image collection.

    Attributes:
        name: what the user wrote.
        classes: class names in label order.
        splits: "train" and, where the source has its own, "val".
        fingerprint: changes when the images change.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, SourceSplit]
    fingerprint: str


def open_source(name: str, cache: Path, say: Callable[[str], None]) -> Source:
    """Opens the source a person named.

    Args:
        name: a folder, `torchvision:NAME` or `fashion-mnist`.
        cache: folder for downloads.
        say: prints one line of progress.

    Raises:
        SourceError: there is no such source, or it holds no labelled images.
    """
    if name == "fashion-mnist":
        return _fashion_source(cache, say)
    if name.startswith("torchvision:"):
        return _torchvision_source(name, cache / "torchvision", say)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SourceError(
            f"source {name!r}: no such folder. A source is a folder of class sub-folders, torchvision:NAME "
            "(for example torchvision:CIFAR10) or fashion-mnist"
        )
    return _folder_source(name, folder)


def split_by_seed(split: SourceSplit, fraction: float, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Shuffles one split into train and val.

    Args:
        split: the samples.
        fraction: share of the val split; exactly round(fraction * size) samples, at least one when positive.
        seed: of the shuffle.

    Returns:
        Sample numbers of "train" and "val" in the order in which they are written.
    """
    order = shuffled(split.size, seed)
    count = max(1, round(fraction * split.size)) if fraction > 0 else 0
    return {"train": order[count:], "val": order[:count]}


def shuffled(size: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on the seed alone."""
    return np.argsort(stream_keys_numpy(seed, 0, np.arange(size), "make_shards"), kind="stable")


def checked(name: str, label: int, extension: str, data: bytes) -> RawSample:
    """A sample whose image was decoded once; formats that WebDataset's readers lack become PNG.

    Raises:
        UnreadableError: the bytes are no whole image.
    """
    try:
        if extension in _CONVERTED:
            with Image.open(io.BytesIO(data)) as image:
                return RawSample(name, label, "png", png_bytes(_eight_bits(image).convert("RGB")))
        decode_rgb(data, _KEPT[extension])
    except (
        IntegrityError, OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise UnreadableError(name, str(error)) from error
    return RawSample(name, label, _KEPT[extension], data)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; PIL's own conversion would clip 16-bit grey at 255.

    Raises:
        ValueError: numbers that are no 16-bit grey, whose black and white nobody tells.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits first")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its pixels reach from {pixels.min()} to {pixels.max()}; convert it to 8 or 16 bits first")
    return Image.fromarray((pixels.astype(np.uint16) >> 8).astype(np.uint8))


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _KEPT or path.suffix.lower() in _CONVERTED


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder_source(name: str, folder: Path) -> Source:
    top = _class_folders(folder)
    roots = {"train": folder}
    named = {_SPLIT_FOLDERS[path.name.lower()]: path for path in top if path.name.lower() in _SPLIT_FOLDERS}
    if named.keys() == {"train", "val"} or (len(top) == 1 and "train" in named):
        others = [path.name for path in top if path.name.lower() not in _SPLIT_FOLDERS]
        if others:
            raise SourceError(
                f"{folder} has folders of splits ({', '.join(path.name for path in named.values())}) and others "
                f"({', '.join(others[:3])}): move the others away, or give the folder of one split"
            )
        roots = named
    classes = tuple(path.name for path in _class_folders(roots["train"]))
    splits: dict[str, SourceSplit] = {}
    digest = hashlib.sha256()
    for split, root in roots.items():
        unknown = [path.name for path in _class_folders(root) if path.name not in classes]
        if unknown:
            raise SourceError(f"{root}: class folders {unknown[:3]} do not exist in {roots['train']}")
        files = [
            (path, label)
            for label, class_name in enumerate(classes)
            for path in sorted((root / class_name).rglob("*"))
            if path.is_file() and _is_image(path)
        ]
        for path, _ in files:
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\n".encode())
        splits[split] = SourceSplit(len(files), _file_reader(files, folder))
    empty = [split for split in splits if split != "train" and not splits[split].size]
    if empty and classes:
        raise SourceError(
            f"{roots[empty[0]]}: no images in class sub-folders of {roots['train']}; put each image into its class's "
            "folder, or take the folder away to have a part of train held out"
        )
    if not classes or not splits["train"].size:
        raise SourceError(
            f"{folder}: no images found. Expected class sub-folders with .jpg, .png or .webp files "
            "(or train/CLASS/... and val/CLASS/...)"
        )
    return Source(name, classes, splits, digest.hexdigest())


def _file_reader(files: Sequence[tuple[Path, int]], folder: Path) -> Callable[[int], RawSample]:
    def read(number: int) -> RawSample:
        path, label = files[number]
        name = path.relative_to(folder).as_posix()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableError(name, error.strerror or str(error)) from error
        return checked(name, label, path.suffix.lower(), data)

    return read


def _fashion_source(cache: Path, say: Callable[[str], None]) -> Source:
    arrays = fashion.load(cache / "fashion-mnist", say)

    def reader(split: str) -> SourceSplit:
        images, labels = arrays[split]

        def read(number: int) -> RawSample:
            data = png_bytes(Image.fromarray(images[number]))
            return RawSample(f"{split}/{number:05d}", int(labels[number]), "png", data)

        return SourceSplit(len(labels), read)

    return Source("fashion-mnist", fashion.CLASSES, {s: reader(s) for s in ("train", "val")}, fashion.FINGERPRINT)


def _torchvision_source(name: str, root: Path, say: Callable[[str], None]) -> Source:
    wanted = name.removeprefix("torchvision:")
    known = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if wanted not in known:
        raise SourceError(f"source {name!r}: torchvision has no data set {wanted!r}. {nearest(wanted, known)}")
    kind = getattr(torchvision.datasets, wanted)
    parameters = inspect.signature(kind.__init__).parameters
    options: dict[str, dict[str, Any]] = {"train": {}}
    if "train" in parameters:
        options = {"train": {"train": True}, "val": {"train": False}}
    elif "split" in parameters:
        options = {
            "train": {"split": "train"},
            "val": {"split": "val" if wanted in ("Imagenette", "Places365") else "test"},
        }
    say(f"reading {wanted} below {root} (downloaded when it is not there)")
    try:
        download = {"download": True} if "download" in parameters else {}
        sets = {split: kind(root=str(root), **chosen, **download) for split, chosen in options.items()}
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise SourceError(f"source {name!r}: torchvision cannot provide it: {error}") from error
    return _from_torchvision(name, sets)


def _from_torchvision(name: str, sets: dict[str, Any]) -> Source:
    train = sets["train"]
    sample = train[0][1] if len(train) else None
    if not isinstance(sample, int | np.integer):
        raise SourceError(f"source {name!r}: its targets are no class numbers ({type(sample).__name__})")
    names = getattr(train, "classes", None) or [str(n) for n in range(1 + max(int(label) for _, label in train))]
    classes = tuple(", ".join(entry) if isinstance(entry, tuple | list) else str(entry) for entry in names)

    def reader(split: str, data: Any) -> Callable[[int], RawSample]:
        paths = getattr(data, "_samples", None) or getattr(data, "samples", None)

        def read(number: int) -> RawSample:
            if paths:
                path = Path(paths[number][0])
                label = int(paths[number][1])
                return checked(f"{split}/{path.name}", label, path.suffix.lower(), path.read_bytes())
            image, label = data[number]
            return RawSample(f"{split}/{number:07d}", int(label), "png", png_bytes(image))

        return read

    splits = {split: SourceSplit(len(data), reader(split, data)) for split, data in sets.items()}
    text = f"{name} torchvision {[(s, v.size) for s, v in splits.items()]}"
    return Source(name, classes, splits, hashlib.sha256(text.encode()).hexdigest())
