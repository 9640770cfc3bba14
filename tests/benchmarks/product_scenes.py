"""Scenes made from real product photographs (Fashion-MNIST), with a class for every pixel.

Each scene shows several products at random places and sizes on a dark, uneven ground; scenes differ in size. A pixel
belongs to a product where the product's photograph is brighter than a tenth of white, and to the last one laid
on it.
Everything derives from (seed, scene), so the same scenes come out on every machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from itpn_core.random import stream_keys_numpy, uniform_numpy
from orchestrator.data.fashion import CLASSES

NAMES = ("ground", *(name.replace("/", " or ") for name in CLASSES))
PRODUCTS = (3, 6)
SIDES = (36, 72)
SIZES = (96, 160)
_EDGE = 0.1


def write_scenes(folder: Path, products, labels, count: int, seed: int) -> None:
    """Writes `count` scenes as folder/images/*.jpg and folder/masks/*.png.

    Args:
        folder: new folder.
        products: uint8 [N, 28, 28].
        labels: uint8 [N], 0 to 9.
        count: scenes.
        seed: of every choice.
    """
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        image, mask = scene(products, labels, index, seed)
        Image.fromarray(image).save(folder / "images" / f"{index:04d}.jpg", quality=92)
        Image.fromarray(mask).save(folder / "masks" / f"{index:04d}.png")


def scene(products, labels, index: int, seed: int):
    """Image uint8 [H, W, 3] and mask uint8 [H, W] of one scene."""
    height, width, number = (
        int(low + draw * (high - low + 1))
        for draw, (low, high) in zip(_draws(seed, index, "scene", 3), (SIZES, SIZES, PRODUCTS), strict=True)
    )
    image, mask = ground(seed, index, height, width), np.zeros((height, width), np.uint8)
    for place in range(number):
        which, size, top, left, side = _draws(seed, index, f"product/{place}", 5)
        chosen = int(which * len(products))
        length = int(SIDES[0] + size * (SIDES[1] - SIDES[0]))
        photo = torch.from_numpy(products[chosen].copy()).float()[None, None] / 255
        photo = F.interpolate(photo, (length, length), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
        photo = photo[:, ::-1] if side < 0.5 else photo
        y, x = int(top * (height - length + 1)), int(left * (width - length + 1))
        part = (slice(y, y + length), slice(x, x + length))
        inside = photo > _EDGE
        image[part] = np.where(inside, photo, image[part])
        mask[part] = np.where(inside, labels[chosen] + 1, mask[part])
    return np.repeat((255 * image).astype(np.uint8)[..., None], 3, -1), mask


def ground(seed: int, index: int, height: int, width: int):
    """A dark, smoothly uneven ground with a little noise, float [H, W]."""
    coarse = torch.tensor(_draws(seed, index, "ground", 16)).view(1, 1, 4, 4)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
    noise = np.array(_draws(seed, index, "noise", height * width)).reshape(height, width)
    return 0.25 * smooth + 0.05 * noise


def _draws(seed: int, index: int, name: str, count: int):
    return uniform_numpy(stream_keys_numpy(seed, 0, [index], name), count)[0].tolist()
