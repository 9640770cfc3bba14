"""Segmentation data: images and class-index PNG masks with the same file stem, checked before anything trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from orchestrator.dense.config import IGNORED
from orchestrator.dense.problems import DenseDataError, refuse

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_INDEX_MODES = ("L", "P", "1")


@dataclass(frozen=True)
class MaskSplit:
    """One checked split: (image, mask) in the order of names."""

    pairs: tuple[tuple[Path, Path], ...]

    def image(self, index: int) -> Tensor:
        """Image by place: float [3, H, W] in [0, 1]."""
        with Image.open(self.pairs[index][0]) as file:
            pixels = np.asarray(file.convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def mask(self, index: int) -> Tensor:
        """Mask by place: int64 [H, W]."""
        return torch.from_numpy(_indices(self.pairs[index][1]).astype(np.int64))


def read_masks(images: str, masks: str, classes: int) -> MaskSplit:
    """Pairs and checks one split.

    Args:
        images: folder of the images.
        masks: folder of the masks; empty for the images' own.
        classes: number of classes.

    Raises:
        DenseDataError: an image has no mask, a mask is no class-index PNG, has another size than its image, or holds an
            index that is no class.
    """
    folder = Path(images).expanduser()
    beside = Path(masks).expanduser() if masks else folder
    for place in (folder, beside):
        if not place.is_dir():
            raise DenseDataError(f"{str(place)!r}: no such folder.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if beside == folder:
        found = [path for path in found if path.suffix.lower() != ".png"]
    if not found:
        kinds = "other than PNG " if beside == folder else ""
        raise DenseDataError(f"{folder}: holds no image {kinds}({', '.join(_IMAGES)}).")
    pairs = tuple((path, beside / f"{path.stem}.png") for path in found)
    refuse(f"{folder} and {beside}", [text for pair in pairs for text in _problems(*pair, classes)])
    return MaskSplit(pairs)


def _problems(image: Path, mask: Path, classes: int) -> list[str]:
    if not mask.is_file():
        return [f"{image.name}: has no mask {mask.name}"]
    try:
        with Image.open(image) as file:
            size = file.size
        with Image.open(mask) as file:
            mode, mask_size = file.mode, file.size
        if mode not in _INDEX_MODES:
            return [f"{mask.name}: is a {mode} image; a mask holds one class index per pixel (PNG mode L or P)"]
        if mask_size != size:
            return [f"{mask.name}: is {mask_size[0]} x {mask_size[1]}, its image is {size[0]} x {size[1]}"]
        wrong = sorted({int(v) for v in np.unique(_indices(mask)) if v >= classes and v != IGNORED})
    except (UnidentifiedImageError, OSError) as error:
        return [f"{image.name} or its mask: not a readable image ({type(error).__name__})"]
    if wrong:
        listed = ", ".join(map(str, wrong[:6]))
        return [
            f"{mask.name}: holds class {listed}; data.classes names {classes} (0 to {classes - 1}, {IGNORED} ignored)"
        ]
    return []


def _indices(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as file:
        return np.asarray(file if file.mode != "1" else file.convert("L").point(bool), dtype=np.uint8)
