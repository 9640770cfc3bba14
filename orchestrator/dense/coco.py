"""COCO-format data: read, checked as a whole before anything trains, and one image at a time as tensors."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pycocotools.coco import COCO
from torch import Tensor

from orchestrator.dense.problems import DenseDataError, refuse

# Annotation tools write boxes that end a rounding error beyond the border.
_BORDER_SLACK = 1.0
# Thinner boxes vanish in single precision when the image is resized.
_THINNEST = 0.01
_PARTS = ("images", "annotations", "categories")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class CocoSplit:
    """One checked split.

    Attributes:
        folder: where the images are.
        coco: pycocotools' index of the annotations.
        image_ids: in the file's order.
        categories: (id, name) in the order of ids; a model's label is the place in it, plus one.
    """

    folder: Path
    coco: COCO
    image_ids: tuple[int, ...]
    categories: tuple[tuple[int, str], ...]

    @property
    def labels(self) -> dict[int, int]:
        """A model's label of each category id; 0 is the background."""
        return {category: place + 1 for place, (category, _) in enumerate(self.categories)}

    def image(self, index: int) -> Tensor:
        """Image by place in `image_ids`: float [3, H, W] in [0, 1]."""
        path = self.folder / self.coco.imgs[self.image_ids[index]]["file_name"]
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def target(self, index: int, *, masks: bool) -> dict[str, Tensor]:
        """Boxes (x0, y0, x1, y1), labels and, if asked, masks [M, H, W] of an image; crowds are left out."""
        image_id = self.image_ids[index]
        record = self.coco.imgs[image_id]
        found = [a for a in self.coco.imgToAnns[image_id] if not a.get("iscrowd")]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, record["width"])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, record["height"])
        target = {"boxes": boxes, "labels": torch.tensor([self.labels[a["category_id"]] for a in found]).long()}
        if masks:
            drawn = [self.coco.annToMask(a) for a in found]
            size = (record["height"], record["width"])
            target["masks"] = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *size, dtype=torch.uint8)
        return target


def read_coco(images: str, annotations: str, *, masks: bool, skip_empty: bool = False) -> CocoSplit:
    """Reads and checks one split.

    Args:
        images: folder of the images.
        annotations: COCO JSON file.
        masks: whether every annotation must have a segmentation.
        skip_empty: leave empty boxes out (COCO's own files hold a few) and say how many.

    Raises:
        DenseDataError: a file or an image is missing, the JSON is damaged, a box is empty or outside of its image, a
            category or image id is unknown, or an image has another size than its record says.
    """
    path, folder = Path(annotations).expanduser(), Path(images).expanduser()
    content = _read_json(path)
    if not folder.is_dir():
        raise DenseDataError(f"images {str(folder)!r}: no such folder.")
    refuse(str(path), _unusable_records(content))
    refuse(f"{path} and {folder}", _image_problems(content, folder))
    if skip_empty:
        _leave_out_empty(content, path)
    refuse(str(path), _annotation_problems(content, masks=masks))
    for record in content["annotations"]:
        # optional in files that others write, needed by the evaluation
        record.setdefault("iscrowd", 0)
        record.setdefault("area", record["bbox"][2] * record["bbox"][3])
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    categories = tuple(sorted((int(c["id"]), str(c["name"])) for c in content["categories"]))
    return CocoSplit(folder, coco, tuple(image["id"] for image in content["images"]), categories)


def check_same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Refuses splits whose categories differ.

    Raises:
        DenseDataError: naming the differing categories.
    """
    differing = sorted(set(train.categories) ^ set(val.categories))
    if differing:
        raise DenseDataError(
            "the train and val annotations have other categories: "
            + ", ".join(f"{number} {name!r}" for number, name in differing[:6])
            + " stand in only one of them. Both need the same ids and names."
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DenseDataError(f"annotations {str(path)!r}: no such file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DenseDataError(f"annotations {path}: not readable as JSON ({error}). Fetch or export it again.") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in _PARTS):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DenseDataError(
            f"annotations {path}: not COCO's format; expected lists {', '.join(_PARTS)}, found {found}."
        )
    for part in ("images", "categories"):
        if not content[part]:
            raise DenseDataError(f"annotations {path}: its list of {part} is empty.")
    return content


_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _unusable_records(content: Record) -> list[str]:
    problems = []
    for part, names in _FIELDS.items():
        seen: set[Any] = set()
        for place, record in enumerate(content[part]):
            missing = [name for name in names if not isinstance(record, dict) or name not in record]
            if missing:
                problems.append(f"{part}[{place}] lacks {', '.join(missing)}")
            elif record["id"] in seen:
                problems.append(f"{part}[{place}] repeats id {record['id']}")
            else:
                seen.add(record["id"])
    return problems


def _image_problems(content: Record, folder: Path) -> list[str]:
    problems = []
    for record in content["images"]:
        path = folder / record["file_name"]
        name = f"image {record['id']} ({record['file_name']})"
        try:
            with Image.open(path) as file:
                size = file.size
        except FileNotFoundError:
            problems.append(f"{name}: no such file in {folder}")
            continue
        except (UnidentifiedImageError, OSError) as error:
            problems.append(f"{name}: not a readable image ({type(error).__name__})")
            continue
        if size != (record["width"], record["height"]):
            problems.append(
                f"{name}: is {size[0]} x {size[1]} pixels, the annotations say {record['width']} x {record['height']}; "
                "boxes would be misplaced"
            )
    return problems


def _leave_out_empty(content: dict[str, Any], path: Path) -> None:
    def empty(box: Any) -> bool:
        return _is_box(box) and min(box[2:]) < _THINNEST

    kept = [record for record in content["annotations"] if not empty(record["bbox"])]
    left_out = len(content["annotations"]) - len(kept)
    if left_out:
        print(f"{path}: {left_out} empty boxes are left out")
    content["annotations"] = kept


def _annotation_problems(content: Record, *, masks: bool) -> list[str]:
    sizes = {record["id"]: (record["width"], record["height"]) for record in content["images"]}
    known = {record["id"] for record in content["categories"]}
    problems = []
    for record in content["annotations"]:
        name = f"annotation {record['id']}"
        if record["image_id"] not in sizes:
            problems.append(f"{name}: image_id {record['image_id']} is not among the images")
            continue
        if record["category_id"] not in known:
            listed = ", ".join(map(str, sorted(known, key=str)[:10]))
            problems.append(f"{name}: category_id {record['category_id']} is unknown; the file's categories: {listed}")
        problems += [f"{name}: {text}" for text in _box_problems(record["bbox"], sizes[record["image_id"]])]
        if masks and not record.get("segmentation"):
            problems.append(f"{name}: has no segmentation; give one, or use detector.kind=faster_rcnn (boxes alone)")
    return problems


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    return numbers and all(math.isfinite(v) for v in box)


def _box_problems(box: Any, size: tuple[int, int]) -> list[str]:
    if not _is_box(box):
        return [f"bbox {box} is not [x, y, width, height] in pixels"]
    x, y, width, height = box
    if min(width, height) < _THINNEST:
        return [f"bbox {box} is empty (width and height must be above 0); remove it, or set data.empty_boxes=skip"]
    inside = (min(x + width, size[0]) - max(x, 0), min(y + height, size[1]) - max(y, 0))
    beyond = (-x, -y, x + width - size[0], y + height - size[1])
    if max(beyond) > _BORDER_SLACK or min(inside) < _THINNEST:
        return [f"bbox {box} (x, y, width, height) leaves its image of {size[0]} x {size[1]}"]
    return []
