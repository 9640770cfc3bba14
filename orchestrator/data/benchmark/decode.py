"""Decode + random-resized crop to 224: images per second of one core, and how far the pixels are from the reference."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from orchestrator.data.decode import decode_rgb
from orchestrator.data.views import Box, TrainView, render

SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pil_usual(data: bytes, box: Box) -> Tensor:
    """PIL, crop, bicubic, ToTensor, Normalize: what most training scripts do."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    normalised: Tensor = transforms.functional.normalize(transforms.functional.to_tensor(image), _MEAN, _STD)
    return normalised


def pil_uint8(data: bytes, box: Box) -> Tensor:
    """PIL decode, torchvision v2 on uint8."""
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    cropped: Tensor = tvf.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
    return cropped


def torchvision_uint8(data: bytes, box: Box) -> Tensor:
    """torchvision.io decode, torchvision v2 on uint8."""
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    cropped: Tensor = tvf.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
    return cropped


def ours(data: bytes, box: Box) -> Tensor:
    """The product's path."""
    out = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
    render(decode_rgb(data, "jpg"), box, out)
    return out


def _variant(**options: bool) -> Callable[[bytes, Box], Tensor]:
    """The product's path with another setting of the decoder (colour images only)."""

    def way(data: bytes, box: Box) -> Tensor:
        out = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
        render(simplejpeg.decode_jpeg(data, **options), box, out)
        return out

    return way


def decode_only(data: bytes, box: Box) -> None:
    """The part that no crop or resize can save: all pixels of the image."""
    decode_rgb(data, "jpg")


WAYS: dict[str, Callable[[bytes, Box], Tensor]] = {
    "PIL + ToTensor + Normalize": pil_usual,
    "PIL + torchvision v2 uint8": pil_uint8,
    "torchvision.io + v2 uint8": torchvision_uint8,
    "ours (simplejpeg + v2 uint8)": ours,
    "ours, chroma repeated": _variant(fastupsample=True),
    "ours, approximate DCT": _variant(fastdct=True),
}
LIMIT = "decode alone, no crop, no resize"


def measure(images: list[bytes], rounds: int) -> list[dict[str, object]]:
    """One row per way; the ways take turns so that a busy machine hits all alike."""
    torch.set_num_threads(1)
    view = TrainView(SIZE)
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    draws = view.draws(0, 0, np.arange(len(images)))
    boxes = [view.box(size[1], size[0], row) for size, row in zip(sizes, draws, strict=True)]
    timed: dict[str, Callable[[bytes, Box], object]] = {**WAYS, LIMIT: decode_only}
    seconds = dict.fromkeys(timed, 0.0)
    for _ in range(rounds):
        for name, way in timed.items():
            began = time.process_time()
            for data, box in zip(images, boxes, strict=True):
                way(data, box)
            seconds[name] += time.process_time() - began
    reference = [pil_uint8(data, box).float() for data, box in zip(images[:100], boxes, strict=False)]
    rows: list[dict[str, object]] = []
    for name in timed:
        rows.append(
            {
                "way": name,
                "images_per_cpu_second": round(rounds * len(images) / seconds[name]),
                "speed": round(seconds["PIL + ToTensor + Normalize"] / seconds[name], 2),
                "mean_difference_of_255": "",
            }
        )
    for row, (name, way) in zip(rows, WAYS.items(), strict=False):
        found = [way(data, box).float() for data, box in zip(images[:100], boxes, strict=False)]
        if name == "PIL + ToTensor + Normalize":
            mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
            found = [(x * std + mean) * 255 for x in found]
        off = float(np.mean([(a - b).abs().mean() for a, b in zip(found, reference, strict=True)]))
        row["mean_difference_of_255"] = round(off, 3)
    return rows
