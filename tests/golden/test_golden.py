"""Outputs and gradients equal the published models' (float32, CPU) within the stored tolerances."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from itpn_core.benchmark.pretraining import materialised_attention
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


@pytest.mark.parametrize("attention", [nullcontext, materialised_attention], ids=["ours", "naive"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_published_model(name, attention):
    """As trained, and as the benchmark's naive step computes it."""
    case = Case.load(name)
    with attention():
        outputs, gradients = run(case, build(case.manifest))
    assert max(outputs.values()) < 1.0, outputs
    assert max(gradients.values(), default=0.0) < 1.0
    assert len(gradients) == len([r for r in case.manifest.get("gradients", {}).get("parameters", {}).values() if r])


@pytest.mark.parametrize(("attention", "materialised"), [(nullcontext, False), (materialised_attention, True)])
def test_naive_attention_is_materialised(attention, materialised):
    case = Case.load("fast_pt_tiny64")
    with profile(activities=[ProfilerActivity.CPU]) as trace, attention():
        run(case, build(case.manifest))
    called = {event.name for event in trace.events()}
    assert ("aten::_scaled_dot_product_attention_math" in called) is materialised
    assert any("flash_attention" in name for name in called) is not materialised


def test_bias_index_is_the_published_buffer():
    case = Case.load("clip_pt_tiny64")
    stored = case.tensors["buffer/relative_position_index"].long()
    assert torch.equal(relative_position_index((4, 4)), stored)
