"""Size, cost and behaviour of the backbone and its stages."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import itpn_core  # noqa: F401 - registers the models
from itpn_core.evaluation.cost import count_flops
from itpn_core.models import (
    Backbone,
    ClipStudent,
    FastStudent,
    ModelConfig,
    PixelStudent,
    build_backbone,
    for_inference,
)
from itpn_core.models.layers import Block

FAMILIES = ["fast", "itpn_clip", "itpn_pixel"]
PUBLISHED = [
    ("fast_itpn_tiny_1112_patch16_224", 24_219_976, 10.68, 71.4),
    ("fast_itpn_small_2220_patch16_224", 39_902_920, 17.86, 119.3),
    ("fast_itpn_base_3324_patch16_224", 84_825_192, 38.10, 240.7),
    ("fast_itpn_large_2240_patch16_256", 312_017_320, 131.5, 791.1),
    ("itpn_base_3324_patch16_224", 78_583_720, 35.63, None),
    ("itpn_large_2240_patch16_224", 288_556_168, 122.24, None),
    ("itpn_pixel_base_3324_patch16_224", 78_557_992, None, None),
    ("itpn_pixel_large_2240_patch16_224", 288_493_576, None, None),
]


def tiny(family: str = "fast", **changes) -> ModelConfig:
    settings = {"embed_dim": 64, "depths": (1, 2, 3), "num_heads": 4, "img_size": 64, **changes}
    return ModelConfig(family=family, **settings)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights at which no term vanishes (layer-scale and heads start small)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "count", "gflop_224", "gflop_512"), PUBLISHED)
def test_published_parameter_counts_and_flops(name, count, gflop_224, gflop_512):
    for size, gflop in ((224, gflop_224), (512, gflop_512)):
        model = timm.create_model(name, img_size=size, device="meta").eval()
        if size == 224:
            assert parameters(model) == count
        if gflop is not None:
            flops = count_flops(model, torch.empty(1, 3, size, size, device="meta"))
            assert flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_published_student_parameter_counts():
    base, large = {"embed_dim": 512, "depths": (3, 3, 24)}, {"embed_dim": 768, "depths": (2, 2, 40)}
    with torch.device("meta"):
        assert parameters(ClipStudent(ModelConfig("itpn_clip", **base), 512)) == 88_738_288
        assert parameters(ClipStudent(ModelConfig("itpn_clip", **large), 768)) == 307_452_904
        assert parameters(PixelStudent(ModelConfig("itpn_pixel", **base))) == 108_493_344
        assert parameters(PixelStudent(ModelConfig("itpn_pixel", **large))) == 318_339_808
        assert parameters(FastStudent(ModelConfig("fast", **base), 768)) == 90_235_602
        assert parameters(FastStudent(ModelConfig("fast", embed_dim=384, depths=(1, 1, 12)), 768)) == 28_782_386


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_any_patch_size_and_non_square_images(family, patch):
    model = build_backbone(tiny(family, patch_size=patch, img_size=4 * patch)).eval()
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    assert model.forward_features(images).shape == (2, 15, 64)
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == [(12, 20), (6, 10), (3, 5), (2, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_set_input_size_equals_resampling_at_run_time(family):
    model = randomised(build_backbone(tiny(family, relative_bias="auto" if family == "fast" else "on")))
    images = torch.randn(2, 3, 48, 96)
    with torch.no_grad():
        before, again = model(images), model(images)
        model.set_input_size((48, 96))
        after = model(images)
    assert torch.equal(before, again)
    torch.testing.assert_close(before, after)
    assert model.grid == (3, 6)


@pytest.mark.parametrize("size", [(63, 64), (64, 8), (0, 64)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="positive multiples of the patch size 16"):
        build_backbone(tiny()).grid_of(*size)


def test_caches_follow_the_weights():
    model = randomised(build_backbone(tiny("itpn_clip")))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first = model(images)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        second = model(images)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with torch.inference_mode():
        third = model(images)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, third)


def test_caches_follow_a_fused_optimizer():
    """It writes weights without raising their version."""
    model = randomised(build_backbone(tiny("itpn_clip")))
    images = torch.randn(2, 3, 64, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        model(images)
    model(images).square().mean().backward()
    version = model.absolute_pos_embed._version
    optimizer.step()
    assert model.absolute_pos_embed._version == version, "then the clearing of caches has no reason any more"
    with torch.no_grad():
        assert torch.equal(model(images), copy.deepcopy(model)(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_path_depends_on_the_sample_key_alone(family):
    model = build_backbone(tiny(family, drop_path_rate=0.5)).train()
    images, keys = torch.randn(6, 3, 64, 64), torch.arange(6) * 977
    together = model(images, keys)
    torch.testing.assert_close(together[2:4], model(images[2:4], keys[2:4]))
    assert not torch.allclose(together, model(images, keys + 1))
    model.eval()
    torch.testing.assert_close(model(images, keys), model(images))


def test_drop_path_factors_have_mean_one_and_rising_rates():
    model = build_backbone(tiny(drop_path_rate=0.4)).train()
    factors = model.drop_path_factors(20_000, torch.device("cpu"), torch.arange(20_000))
    assert factors.shape == (20_000, 1 + 2 + 2 * 3)
    torch.testing.assert_close(factors.mean(0), torch.ones(9), atol=0.03, rtol=0)
    dropped = (factors == 0).float().mean(0)
    torch.testing.assert_close(
        dropped[[0, 1, 3, 4, 7, 8]], torch.tensor([0, 0.08, 0.24, 0.24, 0.4, 0.4]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    model = randomised(build_backbone(tiny(family, drop_path_rate=0.3))).train()
    images, keys = torch.randn(2, 3, 64, 64), torch.arange(2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, keys).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


class Shapes(TorchDispatchMode):
    """Records operator names and the largest trailing two dimensions of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.squares: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append(func.overloadpacket.__name__)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.squares.add(tuple(value.shape[-2:]))
        return out


def test_no_token_by_token_tensor_without_bias():
    model = build_backbone(tiny(img_size=208)).eval()
    with torch.no_grad(), Shapes() as seen:
        model(torch.randn(1, 3, 208, 208))
    assert (169, 169) not in seen.squares
    with torch.no_grad(), Shapes() as seen:
        build_backbone(tiny("itpn_clip", img_size=208)).eval()(torch.randn(1, 3, 208, 208))
    assert (169, 169) in seen.squares


@pytest.mark.parametrize("family", FAMILIES)
def test_stem_blocks_move_no_data(family):
    """Stages 1 and 2 are products, norms and views: deeper stems add no copy and no permutation of activations."""
    counts = []
    for depths in ((1, 1, 1), (3, 4, 1)):
        model = build_backbone(tiny(family, depths=depths)).eval()
        with torch.no_grad(), Shapes() as seen:
            model(torch.randn(1, 3, 64, 64))
        counts.append(sum(op in ("clone", "copy_", "permute", "contiguous") for op in seen.ops))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_copy_is_the_same_function(family):
    model = randomised(build_backbone(tiny(family), num_classes=7))
    folded, images = for_inference(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), atol=1e-4, rtol=1e-4)
    assert not any("gamma" in name for name, _ in folded.named_parameters())
    assert sum("gamma" in name for name, _ in model.named_parameters()) == (
        0 if family == "itpn_pixel" else 6 + 3 * (family == "itpn_clip")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_parts_are_the_attention(family):
    model = randomised(build_backbone(tiny(family)))
    block = model.stage3[1]
    assert isinstance(block, Block)
    x_BNE = torch.randn(2, 16, 64)
    bias = model.attention_bias(block, (4, 4), 1)
    parts = block.attn.query(x_BNE), block.attn.key(x_BNE), block.attn.value(x_BNE)
    torch.testing.assert_close(block.attn.attend(*parts, bias), block.attn(x_BNE, bias))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "vit"}, "family='vit': must be one of"),
        ({"depths": (1, 0, 2)}, "at least 1"),
        ({"embed_dim": 66, "num_heads": 2}, "multiple of 4"),
        ({"num_heads": 5}, "divisible by the heads"),
        ({"patch_size": 12}, "must be one of 4, 8, 16, 32"),
        ({"img_size": 50}, "multiple of patch_size=16"),
        ({"drop_path_rate": 1.0}, r"must lie in \[0, 1\)"),
        ({"relative_bias": "on"}, "Fast-iTPN has no relative positions"),
        ({"in_chans": 0}, "at least 1"),
        ({"layer_scale_init": -0.5}, "family default"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_impossible_backbones_are_refused():
    with pytest.raises(ValueError, match="no class token"):
        Backbone(tiny(), global_pool="token")
    with pytest.raises(ValueError, match="'tokens', 'pooled'"):
        Backbone(tiny(), final_norm="both")
    with pytest.raises(ValueError, match="normed tokens"):
        Backbone(tiny(), pyramid_dim=8, final_norm="pooled")
    with pytest.raises(ValueError, match="NCHW"):
        Backbone(tiny()).forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC")
    with pytest.raises(ValueError, match="built for 16"):
        Backbone(tiny()).set_input_size(64, patch_size=8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_bf16_weights_and_autocast_stay_near_float32(family, size):
    model = randomised(build_backbone(tiny(family, drop_path_rate=0.2), num_classes=7))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.train()(images, torch.arange(2))
            near = model.eval()(images)
        half = model.to(torch.bfloat16)(images.bfloat16())
    assert mixed.shape == want.shape
    assert half.dtype == torch.bfloat16
    for value in (near, half):
        torch.testing.assert_close(value.float(), want, atol=0.05 * want.abs().max().item(), rtol=0.1)


def test_a_used_model_can_be_copied_and_pickled(tmp_path):
    model = randomised(build_backbone(tiny("itpn_clip")))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want = model(images)
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(other(images), want)
