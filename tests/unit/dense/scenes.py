"""Coloured rectangles on noise, and settings of a tiny model."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

SIZES = ((48, 64), (72, 56), (64, 96), (40, 40))
TINY = [
    "model.embed_dim=32", "model.num_heads=2", "model.depths=[1,1,2]", "model.img_size=64", "backbone.pyramid_dim=16",
    "train.batch=2", "train.device=cpu", "train.precision=fp32", "train.log_every=1", "track.follow=false",
]  # fmt: skip


def scene(index, size):
    """An image and its rectangles (x, y, width, height, class 1 or 2)."""
    rng = np.random.default_rng(index)
    width, height = size
    pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    found = []
    for kind in (1, 2)[: 1 + index % 2]:
        w, h = int(rng.integers(12, width // 2)), int(rng.integers(12, height // 2))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        pixels[y : y + h, x : x + w, kind] = 220
        found.append((x, y, w, h, kind))
    return pixels, found


def write_coco(root):
    """A folder of images and their COCO annotations; returns (images folder, annotation file, content)."""
    folder = root / "images"
    folder.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "green"}, {"id": 7, "name": "blue"}]}
    for index, size in enumerate(SIZES):
        pixels, found = scene(index, size)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        image = {"id": 10 + index, "file_name": f"{index}.png", "width": size[0], "height": size[1]}
        content["images"].append(image)
        for x, y, w, h, kind in found:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": (3, 7)[kind - 1],
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon],
            })  # fmt: skip
    path = root / "annotations.json"
    path.write_text(json.dumps(content))
    return folder, path, content


def write_masks(root):
    """Folders of images and class-index masks with one ignored column."""
    images, masks = root / "images", root / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for index, size in enumerate(SIZES):
        pixels, found = scene(index, size)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        for x, y, w, h, kind in found:
            mask[y : y + h, x : x + w] = kind
        mask[:, 0] = 255
        Image.fromarray(pixels).save(images / f"{index}.png")
        Image.fromarray(mask).save(masks / f"{index}.png")
    return images, masks
