"""From encoded bytes to pixels: fastest exact decoder first, every refusal loud."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from orchestrator.data.errors import IntegrityError

MAX_PIXELS = 64_000_000
IMAGE_FIELDS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_FIELDS = frozenset({"cls"})
_PIL_FORMATS = {"jpg": ["JPEG"], "jpeg": ["JPEG"], "png": ["PNG"], "webp": ["WEBP"]}

_PIL_ERRORS = (OSError, ValueError, SyntaxError, KeyError, EOFError)

ImageHWC = npt.NDArray[np.uint8]


def decode_rgb(data: bytes, field: str, max_pixels: int = MAX_PIXELS) -> ImageHWC:
    """Decodes one image.

    Args:
        data: the encoded bytes.
        field: the member's extension: "jpg", "jpeg", "png" or "webp".
        max_pixels: larger images are refused from their header, before any pixel is unpacked.

    Returns:
        uint8 [H, W, 3], or [H, W, 1] for a grey image (the caller repeats the channel after resizing).

    Raises:
        IntegrityError: not a whole image of that format, or too large.
    """
    if field in ("jpg", "jpeg"):
        image = _decode_jpeg(data, max_pixels)
        if image is not None:
            return image
    return _decode_pil(data, field, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> ImageHWC | None:
    """Simplejpeg's pixels, or None where it does not know the colour space or finds the data odd (PIL then judges)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(height, width, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels: ImageHWC = simplejpeg.decode_jpeg(data, colorspace="GRAY" if colorspace == "Gray" else "RGB")
        return pixels
    except IntegrityError:
        raise
    except ValueError:
        return None


def _refuse_bomb(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise IntegrityError(f"image of {width}x{height} pixels refused: more than {max_pixels} allowed")


def _decode_pil(data: bytes, field: str, max_pixels: int) -> ImageHWC:
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS[field]) as image:
            _refuse_bomb(image.height, image.width, max_pixels)
            if image.mode in ("L", "1"):
                return np.array(image.convert("L"))[:, :, None]
            if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip at 255
                return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)[:, :, None]
            if image.mode == "P":  # a palette with transparency must pass through RGBA
                return np.array(image.convert("RGBA").convert("RGB"))
            return np.array(image.convert("RGB"))
    except IntegrityError:
        raise
    except (*_PIL_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise IntegrityError(f"no whole {field} image: {error}") from error
