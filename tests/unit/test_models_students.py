"""What the pre-training students may see, compute and hand on."""

from __future__ import annotations

import pytest
import torch

from itpn_core.models import (
    ClipStudent,
    FastStudent,
    ModelConfig,
    PixelStudent,
    build_backbone,
    ids_from_mask,
    patch_pixels,
)


def config(family: str, **changes) -> ModelConfig:
    return ModelConfig(family=family, embed_dim=64, depths=(1, 1, 4), num_heads=4, img_size=64, **changes)


def mask_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(3, 16, generator=generator).argsort(1)
    return order < count


STUDENTS = {
    "fast": lambda **changes: FastStudent(config("fast", **changes), 24, 32),
    "itpn_clip": lambda **changes: ClipStudent(config("itpn_clip", **changes), 24, 32, mask_laterals=True),
    "itpn_pixel": lambda **changes: PixelStudent(
        config("itpn_pixel", **changes), 32, decoder_dim=32, decoder_depth=1, decoder_heads=2
    ),
}


def prediction(student: torch.nn.Module, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = student(images, mask)
    return out[0] if isinstance(out, tuple) else out


def change_masked(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Other pixels in the masked patches only."""
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return torch.where(hidden, torch.randn_like(images), images)


@pytest.mark.parametrize("family", STUDENTS)
def test_masked_pixels_reach_no_prediction(family):
    student, images, mask = STUDENTS[family]().eval(), torch.randn(3, 3, 64, 64), mask_of(6)
    with torch.no_grad():
        one, other = (prediction(student, x, mask) for x in (images, change_masked(images, mask)))
    assert torch.equal(one, other)


def test_published_clip_student_leaks_and_says_so():
    student = ClipStudent(config("itpn_clip"), 24, 32).eval()
    images, mask = torch.randn(3, 3, 64, 64), mask_of(6)
    with torch.no_grad():
        (lm, lm_cls), (lm_2, lm_cls_2) = (student(x, mask) for x in (images, change_masked(images, mask)))
    assert not torch.allclose(lm, lm_2)
    assert torch.equal(lm_cls, lm_cls_2)
    assert "leak" in ClipStudent.__doc__


@pytest.mark.parametrize("family", STUDENTS)
def test_backbone_state_loads_strictly_and_gives_the_same_features(family):
    student = STUDENTS[family]().eval()
    backbone = build_backbone(student.config).eval()
    backbone.load_state_dict(student.export_backbone_state(), strict=True)
    images = torch.randn(3, 3, 64, 64)
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    with torch.no_grad():
        tokens, _ = backbone.encode(images)
        if family == "fast":
            torch.testing.assert_close(backbone.norm(tokens), student.encode(images)[0])
        elif family == "itpn_pixel":
            torch.testing.assert_close(tokens, student.encode(images, ids_from_mask(nothing)[0])[0])


@pytest.mark.parametrize("family", STUDENTS)
def test_every_trainable_parameter_gets_a_gradient(family):
    student = STUDENTS[family]().train()
    out = student(torch.randn(3, 3, 64, 64), mask_of(6))
    sum(part.square().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("family", STUDENTS)
def test_student_sample_depends_on_its_own_key(family):
    student = STUDENTS[family](drop_path_rate=0.5).train()
    images, mask, keys = torch.randn(3, 3, 64, 64), mask_of(6), torch.arange(3)

    def first(rows: slice) -> torch.Tensor:
        out = student(images[rows], mask[rows], keys[rows])
        return out[0] if isinstance(out, tuple) else out

    torch.testing.assert_close(first(slice(0, 3))[1:2], first(slice(1, 2)), atol=1e-5, rtol=1e-4)


def test_stem_gradient_is_scaled_and_forward_is_not():
    images, mask, grads, outs = torch.randn(2, 3, 64, 64), mask_of(6)[:2], [], []
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        student = FastStudent(config("fast"), 24, 32, stem_gradient_scale=scale)
        out = student(images, mask)
        out.square().mean().backward()
        grads.append(student.patch_embed.proj.weight.grad)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(grads[0] * 0.1, grads[1])


def test_pyramid_levels_have_the_documented_shapes():
    student = FastStudent(config("fast"), 24, 32).eval()
    levels = student.pyramid(torch.randn(2, 3, 64, 96))
    shapes = [tuple(level.shape) for level in levels]
    assert shapes == [(2, 64, 4, 6), (2, 32, 4, 6), (2, 32, 8, 12), (2, 32, 16, 24)]


def test_sparse_encoder_equals_the_dense_stem_on_visible_patches():
    student = STUDENTS["itpn_pixel"]().eval()
    images, mask = torch.randn(3, 3, 64, 64), mask_of(12)
    keep, restore = ids_from_mask(mask)
    assert keep.shape == (3, 4)
    assert torch.equal(ids_from_mask(mask, 12)[1], restore)
    assert not mask.gather(1, keep).any()
    assert torch.equal(
        torch.arange(16).expand(3, 16).gather(1, keep), torch.stack([(~m).nonzero().flatten() for m in mask])
    )
    dense = student.stem(student.embed(images)).f8
    sparse = []
    student.levels, levels = lambda x, stem: sparse.append(stem.f8) or levels(x, stem), student.levels
    with torch.no_grad():
        student.encode(images, keep)
    torch.testing.assert_close(sparse[0], torch.stack([row[ids] for row, ids in zip(dense, keep, strict=True)]))


def test_patch_pixels_are_row_column_channel():
    images = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).reshape(2, 3, 32, 48)
    patches = patch_pixels(images, 16)
    assert torch.equal(patches[1, 4].reshape(16, 16, 3), images[1, :, 16:32, 16:32].permute(1, 2, 0))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="needs family='fast'"):
        FastStudent(config("itpn_clip"), 8)
    with pytest.raises(ValueError, match="needs family='itpn_clip'"):
        ClipStudent(config("fast"), 8)
    with pytest.raises(ValueError, match="needs family='itpn_pixel'"):
        PixelStudent(config("fast"))
    with pytest.raises(ValueError, match="decoder_heads=3"):
        PixelStudent(config("itpn_pixel"), decoder_dim=32, decoder_heads=3)
    with pytest.raises(ValueError, match="both are None"):
        STUDENTS["itpn_pixel"]()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least one must stay visible"):
        ids_from_mask(torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="sparse pixel encoder"):
        PixelStudent(config("itpn_pixel", relative_bias="on")).encode(
            torch.zeros(1, 3, 64, 64), torch.zeros(1, 4).long()
        )
