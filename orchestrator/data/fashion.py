"""The built-in sample data: Fashion-MNIST, 70,000 product photographs of 10 kinds (Xiao et al. 2017, MIT licence).

Two routes lead to the same verified bytes: Debian's package (no root: downloaded and unpacked, not installed), and the
authors' files through torchvision.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torchvision

from orchestrator.data.errors import SourceError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PACKAGE = "dataset-fashion-mnist"
_FILES = {
    # name: sha256 of the uncompressed file (the two routes differ in their gzip headers only)
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FINGERPRINT = hashlib.sha256("".join(_FILES.values()).encode()).hexdigest()

Arrays = dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]


def load(cache: Path, say: Callable[[str], None]) -> Arrays:
    """Images and labels, fetched once and verified each time.

    Args:
        cache: folder that keeps the four uncompressed files.
        say: prints one line of progress.

    Returns:
        "train" and "val": uint8 [N, 28, 28] and uint8 [N].

    Raises:
        SourceError: neither route gave the right bytes.
    """
    if not all(_valid(cache / name) for name in _FILES):
        _fetch(cache, say)
    return {
        split: (
            np.frombuffer((cache / f"{stem}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer((cache / f"{stem}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8),
        )
        for split, stem in (("train", "train"), ("val", "t10k"))
    }


def _valid(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _FILES[path.name]


def _fetch(cache: Path, say: Callable[[str], None]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    failures = []
    for title, route in (("Debian's package " + PACKAGE, _from_debian), ("torchvision's download", _from_torchvision)):
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                say(f"fetching Fashion-MNIST (31 MB) from {title}")
                for packed in route(Path(folder)):
                    _unpack(packed, cache)
                return
            except (SourceError, OSError, RuntimeError, EOFError) as error:
                failures.append(f"{title}: {error}")
                say(f"  not available: {error}")
    raise SourceError("Fashion-MNIST could not be fetched. " + "; ".join(failures))


def _unpack(packed: Path, cache: Path) -> None:
    data = gzip.decompress(packed.read_bytes())
    name = packed.name.removesuffix(".gz")
    if hashlib.sha256(data).hexdigest() != _FILES[name]:
        raise SourceError(f"{packed.name} has another checksum than the published data; not used")
    partial = cache / f".{name}.partial"
    partial.write_bytes(data)
    partial.replace(cache / name)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)  # noqa: S603
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines() or ["no message"]
        raise SourceError(f"`{' '.join(command)}` failed: {lines[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"`{' '.join(command)}` gave no answer within 300 s") from error


def _from_debian(folder: Path) -> list[Path]:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise SourceError(f"{' and '.join(missing)} not on this machine")
    _run(["apt-get", "download", PACKAGE], folder)
    packages = list(folder.glob("*.deb"))
    if len(packages) != 1:
        raise SourceError("apt-get downloaded nothing")
    _run(["dpkg-deb", "-x", str(packages[0]), "unpacked"], folder)
    return [folder / "unpacked/usr/share/datasets/fashion-mnist" / f"{name}.gz" for name in _FILES]


def _from_torchvision(folder: Path) -> list[Path]:
    torchvision.datasets.FashionMNIST(root=str(folder), download=True)
    return [folder / "FashionMNIST/raw" / f"{name}.gz" for name in _FILES]
