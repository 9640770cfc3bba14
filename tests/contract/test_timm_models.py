"""The checks that timm applies to every model of its own, applied to ours.

Most run on shrunk widths and depths through the same entry points; one full model runs as it is.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils.model import freeze
from torch import nn

import itpn_core  # noqa: F401 - registers the models

NAMES = timm.list_models("*itpn*")
SMALL = {"embed_dim": 64, "depths": (1, 2, 3), "num_heads": 4, "img_size": 64}
PYRAMIDS = [0, 32]


def small(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **kwargs})


def test_every_published_name_is_registered():
    assert {
        "fast_itpn_tiny_1112_patch16_224",
        "fast_itpn_small_2220_patch16_224",
        "fast_itpn_base_3324_patch16_224",
        "fast_itpn_large_2240_patch16_256",
        "itpn_base_3324_patch16_224",
        "itpn_large_2240_patch16_224",
        "itpn_pixel_base_3324_patch16_224",
        "itpn_pixel_large_2240_patch16_224",
        "itpn_tiny_1110_patch16_224",
        "itpn_small_2220_patch16_224",
    } == set(NAMES)
    assert all(
        "Inferred" in timm.model_entrypoint(name).__doc__ for name in NAMES if name.startswith(("itpn_t", "itpn_s"))
    )


def test_a_full_model_as_it_is():
    model = timm.create_model("fast_itpn_tiny_1112_patch16_224")
    out = model(torch.randn(1, 3, 224, 224))
    out.mean().backward()
    assert out.shape == (1, 1000)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    model = small(name, num_classes=42).train()
    out = model(torch.randn(2, 3, 64, 64))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert out.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name):
    model, images = small(name).eval(), torch.randn(1, 3, 64, 64)
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert cfg["classifier"] + ".weight" in keys
    assert cfg["first_conv"] + ".weight" in keys
    assert cfg["architecture"] == name
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 256, 256) if name.endswith("256") else (3, 224, 224)
    assert model.get_classifier() is model.head

    features = model.forward_features(images)
    assert features.shape == (1, 16, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(images))
    model.reset_classifier(0)
    assert model(images).shape == (1, model.num_features)
    torch.testing.assert_close(model(images), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 16, model.num_features)
    model.reset_classifier(10, "avg")
    assert model(images).shape == (1, 10)


def test_tags_have_their_sizes():
    for tag in timm.list_pretrained("*itpn*") + [f"{NAMES[0]}.{tag}" for tag in ("clip_l_ft_in21k_in1k_512",)]:
        model = timm.create_model(tag, embed_dim=64, depths=(1, 1, 1))
        size = model.pretrained_cfg["input_size"][-1]
        assert model.grid == (size // 16, size // 16)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(NAMES[0], pretrained=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pyramid_dim", PYRAMIDS)
def test_features_only(name, pyramid_dim):
    model = small(name, features_only=True, pyramid_dim=pyramid_dim).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    images = torch.randn(2, 3, 64, 96)
    maps = model(images)
    assert [level.shape[1] for level in maps] == model.feature_info.channels()
    for level, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        assert level.shape[-2:] == (64 // reduction, 96 // reduction)
    fewer = small(name, features_only=True, pyramid_dim=pyramid_dim, out_indices=(0, -2)).eval()
    fewer.load_state_dict(model.state_dict())
    for level, want in zip(fewer(images), (maps[0], maps[2]), strict=True):
        torch.testing.assert_close(level, want)


@pytest.mark.parametrize("name", NAMES)
def test_levels_without_attention_need_no_attention_weights(name):
    model = small(name, features_only=True, out_indices=(0, 1))
    assert len(model.model.blocks) == 1 + 1 + 2 + 1
    assert [tuple(level.shape[-2:]) for level in model(torch.randn(1, 3, 64, 64))] == [(16, 16), (8, 8)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pyramid_dim", PYRAMIDS)
def test_forward_intermediates(name, pyramid_dim):
    model, images = small(name, pyramid_dim=pyramid_dim).eval(), torch.randn(1, 3, 80, 64)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert len(maps) == 4
    for info, level in zip(model.feature_info, maps, strict=True):
        want = tuple(math.ceil(side / info["reduction"]) for side in (80, 64))
        assert tuple(level.shape[1:]) == (info["num_chs"], *want)
    last = model.forward_intermediates(images, indices=2, intermediates_only=True, output_fmt="NHWC")
    assert len(last) == 2
    torch.testing.assert_close(last[0].permute(0, 3, 1, 2), maps[2])
    early = model.forward_intermediates(images, indices=[1], intermediates_only=True, stop_early=True)
    torch.testing.assert_close(early[0], maps[1])
    if not pyramid_dim:
        normed = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(normed.mean(1), torch.zeros_like(normed.mean(1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip_and_meta_construction(name):
    model = small(name)
    other = small(name, device="meta")
    assert all(parameter.is_meta for parameter in other.parameters())
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in small(name).parameters())
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(other.eval()(images), model.eval()(images))
    assert small(name, dtype=torch.bfloat16).patch_embed.proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_common_arguments(name):
    model = small(name, in_chans=5, num_classes=3, drop_rate=0.3, drop_path_rate=0.2, global_pool="avg")
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 3)
    assert model.head_drop.p == 0.3
    assert model.config.drop_path_rate == 0.2
    assert small(name, img_size=(32, 96)).grid == (2, 6)
    with pytest.raises(TypeError, match="unknown_argument"):
        small(name, unknown_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups(name):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == set(dict(model.named_parameters()))
    # stem, then one group per block (1 + 2 + 3): a merge belongs to the block before it, fc_norm to the last
    depth = dict(groups)
    assert depth["patch_embed.proj.weight"] == 0
    assert depth["blocks.0.norm2.weight"] == depth["blocks.1.reduction.weight"] == 1
    assert depth["blocks.3.norm2.weight"] == depth["blocks.4.norm.weight"] == 3
    assert [depth[f"blocks.{block}.norm2.weight"] for block in (5, 6, 7)] == [4, 5, 6]
    assert depth["head.weight"] == max(depth.values())
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) == 5
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.blocks[0].norm2.weight)] < scale[id(model.blocks[7].norm2.weight)] < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_decay_names_exist(name):
    model = small(name)
    names = model.no_weight_decay() & set(dict(model.named_parameters()))
    assert ("pos_embed" if name.startswith("fast") else "absolute_pos_embed") in names
    assert len(names) == (1 if name.startswith("fast") else 4)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1)
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert all(id(model.get_parameter(parameter)) in free for parameter in names)


def test_parts_can_be_frozen():
    model = small(NAMES[0])
    freeze(model, ["patch_embed", "blocks.0"])
    assert not any(parameter.requires_grad for parameter in model.patch_embed.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_exports_in_one_graph(name):
    model, images = small(name).eval(), torch.randn(2, 3, 64, 64)
    want = model(images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), want)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), want)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_training_step_compiles_in_one_graph(size, backend):
    model, images = small("itpn_base_3324_patch16_224", drop_path_rate=0.3).train(), torch.randn(2, 3, *size)
    keys = torch.arange(2)
    want = model(images, keys)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    out = compiled(images, keys)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert model.blocks[0].norm2.weight.grad is not None


def test_features_compile_and_export_in_one_graph():
    model, images = (
        small("fast_itpn_base_3324_patch16_224", features_only=True, pyramid_dim=32).eval(),
        torch.randn(1, 3, 64, 64),
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(model, (images,)).module()
    for one, two, want in zip(compiled(images), exported(images), model(images), strict=True):
        torch.testing.assert_close(one, want)
        torch.testing.assert_close(two, want)


@pytest.mark.long
def test_inductor_gives_the_same_numbers():
    model, images = small("fast_itpn_base_3324_patch16_224").eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), atol=1e-5, rtol=1e-4)
