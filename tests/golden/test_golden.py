"""Outputs and gradients equal the published models' (float32, CPU) within the stored tolerances."""

from __future__ import annotations

import pytest
import torch

from itpn_core.models.positions import relative_position_index
from tests.golden.adapter import build
from tests.golden.cases import CASES, Case, run

NAMES = sorted(path.stem for path in CASES.glob("*.json"))


def test_every_family_has_a_case():
    families = {Case.load(name).manifest["family"] for name in NAMES}
    assert families == {
        "fast_itpn_classifier",
        "fast_itpn_pretrain",
        "itpn_clip_classifier",
        "itpn_clip_pretrain",
        "itpn_pixel_pretrain",
        "itpn_segmentation_pyramid",
    }


@pytest.mark.parametrize("name", NAMES)
def test_equals_published_model(name):
    case = Case.load(name)
    outputs, gradients = run(case, build(case.manifest))
    assert max(outputs.values()) < 1.0, outputs
    assert max(gradients.values(), default=0.0) < 1.0
    assert len(gradients) == len([r for r in case.manifest.get("gradients", {}).get("parameters", {}).values() if r])


def test_bias_index_is_the_published_buffer():
    case = Case.load("clip_pt_tiny64")
    stored = case.tensors["buffer/relative_position_index"].long()
    assert torch.equal(relative_position_index((4, 4)), stored)
