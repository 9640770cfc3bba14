"""Importing and exporting checkpoints: what is loaded, what is said, what is refused."""

from __future__ import annotations

import argparse
import copy
import os
import pickle

import pytest
import timm
import torch

import itpn_core  # noqa: F401 - registers the models
from itpn_core.errors import WeightsError
from itpn_core.models import (
    Backbone,
    ClipStudent,
    FastStudent,
    ModelConfig,
    PixelStudent,
    build_backbone,
    export_checkpoint,
    for_inference,
    load_checkpoint,
    model_from_checkpoint,
)
from itpn_core.models.checkpoint import read_weights

FAMILIES = ["fast", "itpn_clip", "itpn_pixel"]


def tiny(family: str = "fast", **changes) -> ModelConfig:
    settings = {"embed_dim": 64, "depths": (1, 2, 3), "img_size": 64, **changes}
    return ModelConfig(family=family, **settings)


def classifier(family: str = "fast", classes: int = 5, **changes) -> Backbone:
    bias = "auto" if family == "fast" else "on"
    return Backbone(tiny(family, **{"relative_bias": bias, **changes}), num_classes=classes, final_norm="pooled")


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_and_import_round_trip(tmp_path, family, suffix):
    model, path = classifier(family), tmp_path / f"weights{suffix}"
    export_checkpoint(model, path)
    rebuilt, report = model_from_checkpoint(path, quiet=True)
    facts = ("embed_dim", "depths", "heads", "patch_size", "img_size", "layer_scale", "has_relative_bias")
    assert all(getattr(rebuilt.config, fact) == getattr(model.config, fact) for fact in facts)
    assert rebuilt.config.family == family
    assert same(rebuilt.state_dict(), model.state_dict())
    assert not report.missing
    assert not report.resampled
    assert set(report.unused) == (set() if family == "fast" else {"relative_position_index"})


def test_export_has_the_official_names_of_published_models(tmp_path):
    export_checkpoint(timm.create_model("fast_itpn_tiny_1112_patch16_224", depths=(3, 3, 24)), tmp_path / "fast.pt")
    names = set(torch.load(tmp_path / "fast.pt", weights_only=True)["model"])
    assert len(names) == 567
    assert {"pos_embed", "blocks.31.attn.q_bias", "blocks.7.reduction.weight", "fc_norm.bias", "head.weight"} <= names


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "module._orig_mod."])
def test_wrappers_prefixes_half_precision_and_arguments(tmp_path, wrapper, prefix):
    model, target = classifier(), classifier()
    state = {prefix + name: value.half() for name, value in model.state_dict().items()}
    content = {wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "weights.pth")
    report = load_checkpoint(target, tmp_path / "weights.pth", quiet=True)
    assert len(report.loaded) == len(model.state_dict())
    assert target.pos_embed.dtype == torch.float32
    torch.testing.assert_close(
        target.blocks[4].reduction.weight, model.blocks[4].reduction.weight, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_checkpoint_into_a_classifier(family, capsys):
    student = {
        "fast": lambda c: FastStudent(c, 24, 32),
        "itpn_clip": lambda c: ClipStudent(c, 24, 32),
        "itpn_pixel": lambda c: PixelStudent(c, 32, decoder_dim=32, decoder_depth=1, decoder_heads=2),
    }[family](tiny(family))
    model = classifier(family)
    report = load_checkpoint(model, {"model": student.state_dict()})
    printed = capsys.readouterr().out
    assert "mask_token" in report.unused
    assert "used in pre-training only" in printed
    assert "keeps its initial values" in report.missing["head.weight"]
    assert torch.equal(model.blocks[0].mlp.fc1.weight, student.blocks[0].mlp.fc1.weight)
    if family == "fast":
        assert torch.equal(model.fc_norm.weight, student.norm.weight)
        assert report.renamed["norm.weight"] == "the final norm is fc_norm here"
    tables = [name for name in report.missing if name.endswith("relative_position_bias_table")]
    assert len(tables) == (3 if family == "itpn_pixel" else 0)
    accounted = {*report.loaded, *report.unused, *report.renamed} - {"fc_norm.weight", "fc_norm.bias"}
    assert accounted == set(student.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_tables_are_resampled(family):
    model, target = classifier(family), classifier(family, img_size=96)
    report = load_checkpoint(target, model.state_dict(), quiet=True)
    assert len(report.resampled) == (1 if family == "fast" else 4)
    assert set(report.resampled.values()) == {"4x4 to 6x6"}
    model.set_input_size(96)
    assert same(model.state_dict(), target.state_dict())


def test_a_classifier_of_another_size_keeps_its_own_head():
    model, target = classifier(classes=5), classifier(classes=9)
    head = target.head.weight.clone()
    report = load_checkpoint(target, model.state_dict(), quiet=True)
    assert torch.equal(target.head.weight, head)
    assert report.unused["head.weight"] == "the file's classifier is [5, 64], the model's [9, 64]"
    assert "classifier of another size" in report.missing["head.weight"]


def test_a_pyramid_backbone_takes_the_students_pyramid():
    student = FastStudent(tiny(), 24, 32)
    model, report = model_from_checkpoint(student.state_dict(), quiet=True, pyramid_dim=32)
    images = torch.randn(1, 3, 64, 64)
    maps = model.eval().forward_intermediates(images, intermediates_only=True)
    wanted = student.eval().pyramid(images)
    for level, want in zip(maps, (wanted.p4, wanted.p8, wanted.p16), strict=False):
        torch.testing.assert_close(level, want)
    assert not report.missing


def test_a_model_on_the_meta_device_is_filled(tmp_path):
    model = classifier()
    target = Backbone(model.config, num_classes=5, final_norm="pooled", device="meta")
    load_checkpoint(target, model.state_dict(), quiet=True)
    assert same(target.state_dict(), model.state_dict())
    assert target.pos_embed.data_ptr() != model.pos_embed.data_ptr()
    meta = Backbone(tiny("itpn_clip"), num_classes=5, final_norm="pooled", device="meta")
    with pytest.raises(WeightsError, match=r"lacks fc_norm\.weight, fc_norm\.bias, head\.weight"):
        load_checkpoint(meta, build_backbone(tiny("itpn_clip")).state_dict(), quiet=True)


def test_timm_loads_a_local_file(tmp_path):
    model, path = classifier(classes=1000), tmp_path / "weights.pt"
    export_checkpoint(model, path)
    shape = {"embed_dim": 64, "depths": (1, 2, 3), "num_heads": 1}
    for size, classes in ((64, 1000), (96, 7)):
        loaded = timm.create_model(
            "fast_itpn_tiny_1112_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
            img_size=size,
            num_classes=classes,
            **shape,
        )
        assert torch.equal(loaded.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
        assert loaded.pos_embed.shape[1] == (size // 16) ** 2


class Attack:
    """A pickle that would create a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged_files(folder):
    good = folder / "good.pt"
    export_checkpoint(classifier(), good)
    export_checkpoint(classifier(), folder / "good.safetensors")
    data = good.read_bytes()
    (folder / "half.pt").write_bytes(data[: len(data) // 2])
    tensors = (folder / "good.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(tensors[: len(tensors) // 2])
    (folder / "header.safetensors").write_bytes(b"\xff" * 64)
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("<html>not found</html>")
    torch.save({"model": classifier().state_dict(), "extra": Attack(str(folder / "pwned"))}, folder / "code.pt")
    with (folder / "legacy.pt").open("wb") as file:
        pickle.dump(Attack(str(folder / "pwned")), file)
    torch.save({"model": "a string"}, folder / "string.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    return {
        "half.pt": "truncated or not a checkpoint",
        "half.safetensors": "truncated or not a checkpoint",
        "header.safetensors": "truncated or not a checkpoint",
        "empty.pt": "the file is empty",
        "text.pt": "Nothing in it was executed",
        "code.pt": "asks to run code.*mkdir.*Nothing was executed",
        "legacy.pt": "Nothing in it was executed",
        "string.pt": "no weights found; top-level keys are model",
        "list.pt": "holds a list",
        "absent.pt": "no such file",
    }


def test_bad_files_are_refused_and_nothing_runs(tmp_path):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    for name, message in damaged_files(tmp_path).items():
        with pytest.raises(WeightsError, match=message) as error:
            load_checkpoint(model, tmp_path / name)
        assert name in str(error.value)
        assert same(before, model.state_dict())
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            lambda: timm.create_model("resnet18").state_dict(),
            "not an iTPN or Fast-iTPN checkpoint; keys begin with conv1",
        ),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), "not an iTPN or Fast-iTPN"),
        (lambda: classifier(embed_dim=128).state_dict(), r"embed_dim 128 \(model: 64\)"),
        (lambda: classifier(depths=(1, 2, 4)).state_dict(), r"depths \(1, 2, 4\) \(model: \(1, 2, 3\)\)"),
        (lambda: classifier(patch_size=8).state_dict(), r"patch_size 8 \(model: 16\)"),
        (lambda: classifier(in_chans=1).state_dict(), r"in_chans 1 \(model: 3\)"),
        (lambda: classifier("itpn_clip").state_dict(), r"is_fast False \(model: True\)"),
        (lambda: classifier(layer_scale_init=0.0).state_dict(), "layer-scale absent"),
        (lambda: {k: v for k, v in classifier().state_dict().items() if "blocks.6" not in k}, "lacks blocks.6"),
        (lambda: {**classifier().state_dict(), "blocks.6.attn.q_bias": torch.zeros(3)}, r"q_bias is \[3\]"),
        (
            lambda: {**classifier().state_dict(), "pos_embed": torch.zeros(1, 15, 64)},
            "15 positions do not form a square",
        ),
        (lambda: {"weird": torch.zeros(1)}, "keys begin with weird"),
        (dict, r"top-level keys are \(none\)"),
    ],
)
def test_wrong_models_are_refused_and_the_model_is_untouched(source, message):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(model, source())
    assert same(before, model.state_dict())


def test_non_square_positions_need_their_grid():
    wide = classifier()
    wide.set_input_size((48, 80))
    model = classifier()
    with pytest.raises(WeightsError, match="pass the grid"):
        load_checkpoint(model, wide.state_dict(), quiet=True)
    with pytest.raises(WeightsError, match="does not fit 15 positions"):
        load_checkpoint(model, wide.state_dict(), grid=(4, 4), quiet=True)
    report = load_checkpoint(model, wide.state_dict(), grid=(3, 5), quiet=True)
    assert report.resampled == {"pos_embed": "3x5 to 4x4"}


def test_folded_models_are_neither_exported_nor_loaded(tmp_path):
    folded = for_inference(classifier())
    with pytest.raises(WeightsError, match="export the original"):
        export_checkpoint(folded, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="fold again"):
        load_checkpoint(folded, classifier().state_dict())


def test_flavours_are_told_apart_by_their_keys():
    for family, bias in (("fast", "off"), ("itpn_clip", "on"), ("itpn_clip", "off"), ("itpn_pixel", "on")):
        model = build_backbone(tiny(family, relative_bias=bias, patch_size=8))
        rebuilt, _ = model_from_checkpoint(model.state_dict(), quiet=True)
        assert rebuilt.config.family == family
        assert rebuilt.config.has_relative_bias == (bias == "on")
        assert rebuilt.config.layer_scale == model.config.layer_scale
        images = torch.randn(1, 3, 64, 64)
        assert torch.equal(rebuilt.eval()(images), model.eval()(images))


def test_read_weights_drops_what_is_not_a_tensor(tmp_path):
    torch.save({"state_dict": {**classifier().state_dict(), "note": "hello"}}, tmp_path / "weights.pt")
    assert "note" not in read_weights(tmp_path / "weights.pt")
