"""Small dense data sets in folders of their own."""

from __future__ import annotations

import pytest

from tests.unit.dense.scenes import write_coco, write_masks


@pytest.fixture
def coco(tmp_path):
    """(images folder, annotation file, content)."""
    return write_coco(tmp_path)


@pytest.fixture
def masks(tmp_path):
    """(images folder, masks folder)."""
    return write_masks(tmp_path)
