"""Exports: each format is re-loaded in a fresh process, compared, and kept only when equal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from itpn_core.errors import UserError, WeightsError
from itpn_core.models import Backbone, ModelConfig, export_checkpoint
from itpn_core.models.fast_student import FastStudent
from itpn_core.reduction.config import TokenGathering, TokenMigration
from orchestrator.checkpoint.source import open_source
from orchestrator.checkpoint.store import CheckpointStore, Snapshot
from orchestrator.data.folder import Folder
from orchestrator.export.compare import difference
from orchestrator.export.config import FORMATS, ExportConfig
from orchestrator.export.formats import Program
from orchestrator.export.run import export
from orchestrator.launch.cli import run_job

SMALL = {"embed_dim": 32, "depths": (1, 1, 3), "num_heads": 2, "img_size": 96}
MIGRATION = TokenMigration(layers=(1,), keep=(0.5,))


def classifier(path, family="fast", **kwargs):
    torch.manual_seed(0)
    model = Backbone(ModelConfig(family=family, **SMALL), num_classes=5, final_norm="pooled", **kwargs)
    torch.nn.init.normal_(model.head.weight)
    export_checkpoint(model, path)
    return model


def write_run(folder, *, averaged=True):
    """A run folder as the engine leaves it: run.json and a committed checkpoint of a student with its pyramid."""
    torch.manual_seed(1)
    config = ModelConfig(**SMALL)
    student = FastStudent(config, 16, 24)
    fields = {f"model.{k}": v for k, v in {**SMALL, "family": "fast"}.items()}
    fields |= {"objective.kind": "fast", "objective.mean": [0.5, 0.4, 0.3], "objective.std": [0.2, 0.2, 0.2]}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run_uid": "0", "fields": fields}))
    live = {f"task/student.{k}": v.clone() for k, v in student.state_dict().items()}
    average = {f"average/student.{k}": v + 1 for k, v in student.named_parameters()} if averaged else {}
    store = CheckpointStore(Folder(str(folder)), keep=1)
    store.save(Snapshot(7, {**live, **{k: v.detach().clone() for k, v in average.items()}}, {}))
    store.close()
    return student


def test_a_run_gives_its_averaged_weights_with_the_pyramid(tmp_path):
    student = write_run(tmp_path / "run")
    source = open_source(str(tmp_path / "run"), pyramid=True)
    assert source.pyramid_dim == 24
    assert source.mean == (0.5, 0.4, 0.3)
    assert source.facts["step"] == "7"
    assert source.facts["weights"] == "moving average"
    model, report = source.build()
    assert torch.equal(model.pos_embed, student.pos_embed + 1)
    assert torch.equal(model.fpn_modules[0].norm2.weight, student.fpn_modules[0].norm2.weight + 1)
    assert not report.missing


def test_a_run_without_averages_gives_live_weights_and_can_leave_the_pyramid_new(tmp_path):
    student = write_run(tmp_path / "run", averaged=False)
    source = open_source(str(tmp_path / "run"), pyramid=True)
    assert source.facts["weights"] == "live"
    model, report = source.build(with_pyramid=False)
    assert torch.equal(model.pos_embed, student.pos_embed)
    assert not torch.equal(model.align_dim_16tofpn.weight, student.align_dim_16tofpn.weight)
    assert all(name.startswith(("align_", "fpn_", "split_", "block_")) for name in report.missing)


@pytest.mark.parametrize(("place", "words"), [
    ("", "no source given"),
    ("/nowhere/at/all", "no such file or directory"),
    ("/nowhere/weights.pt", "no such file"),
])  # fmt: skip
def test_a_source_that_is_not_there_is_told(place, words):
    with pytest.raises(WeightsError, match=words):
        open_source(place, pyramid=True)


def test_a_folder_that_is_no_run_is_told_with_its_content(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match=r"no weights there; .* beside run.json.* holds notes.txt"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(("family", "reduction"), [
    ("fast", {"migration": MIGRATION}),
    pytest.param("fast", {}, marks=pytest.mark.long),
    pytest.param("itpn_pixel", {}, marks=pytest.mark.long),
    pytest.param("itpn_clip", {"migration": MIGRATION}, marks=pytest.mark.long),
    pytest.param("fast", {"gathering": TokenGathering(window=4, tokens=2)}, marks=pytest.mark.long),
])  # fmt: skip
def test_every_format_is_equal_in_a_fresh_process(tmp_path, capsys, family, reduction):
    classifier(tmp_path / "weights.pth", family)
    config = ExportConfig(source=str(tmp_path / "weights.pth"), dest=str(tmp_path / "out"), num_heads=2, **reduction)
    code = export(config)
    said = capsys.readouterr().out
    assert code == 0, said
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["compared"].keys() == set(FORMATS)
    for found in record["compared"].values():
        assert found["largest difference"] <= found["tolerance"] < 0.01
    assert record["model"]["migration"]["layers"] == list(reduction.get("migration", TokenMigration()).layers)


def test_maps_of_a_run_take_raw_images_and_any_batch(tmp_path):
    import onnxruntime

    write_run(tmp_path / "run")
    config = ExportConfig(
        source=str(tmp_path / "run"),
        dest=str(tmp_path / "out"),
        formats=("timm", "onnx"),
        output="maps",
        raw_input=True,
    )
    assert export(config) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    maps = session.run(None, {"images": np.zeros((5, 3, 96, 96), np.float32)})
    assert [level.shape for level in maps] == [(5, 24, side, side) for side in (24, 12, 6, 3)]
    assert session.get_outputs()[0].name == "map_stride_4"
    card = (tmp_path / "out" / "timm" / "README.md").read_text()
    assert "mean [0.5, 0.4, 0.3]" in card
    assert "| feature pyramid | 24 wide |" in card
    again = open_source(str(tmp_path / "out" / "timm"))
    assert again.mean == (0.5, 0.4, 0.3)
    assert again.model.heads == 2


def test_an_operator_without_onnx_form_is_named_and_nothing_is_kept(tmp_path, capsys):
    classifier(tmp_path / "weights.pth")
    random = TokenMigration(layers=(1,), keep=(0.5,), rule="random")
    config = ExportConfig(
        source=str(tmp_path / "weights.pth"),
        dest=str(tmp_path / "out"),
        formats=("onnx",),
        migration=random,
        num_heads=2,
    )
    assert export(config) == 1
    assert "FAILED: onnx: the operator aten.view.dtype has no ONNX form. It comes from migration.rule=random" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, capsys, monkeypatch):
    classifier(tmp_path / "weights.pth")
    from orchestrator.export import formats

    def wrong(subject, folder):
        path = folder / "model.safetensors"
        state = {k: v.clone() for k, v in subject.model.state_dict().items()}
        state["head.bias"] += 1
        save_file(state, path)
        return path

    monkeypatch.setitem(formats._WRITERS, "safetensors", wrong)
    config = ExportConfig(
        source=str(tmp_path / "weights.pth"), dest=str(tmp_path / "out"), formats=("safetensors",), num_heads=2
    )
    assert export(config) == 1
    assert "re-loaded outputs differ by 1" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_file_tells_what_the_fresh_process_said(tmp_path, capsys, monkeypatch):
    classifier(tmp_path / "weights.pth")
    from orchestrator.export import formats

    def broken(subject, folder):
        (folder / "model.onnx").write_bytes(b"no graph")
        return folder / "model.onnx"

    monkeypatch.setitem(formats._WRITERS, "onnx", broken)
    config = ExportConfig(
        source=str(tmp_path / "weights.pth"), dest=str(tmp_path / "o"), formats=("onnx",), num_heads=2
    )
    assert export(config) == 1
    assert "FAILED: a fresh process cannot load it: onnxruntime" in capsys.readouterr().out


def test_the_fresh_process_refuses_what_a_format_must_not_need(tmp_path):
    import subprocess
    import sys

    from orchestrator.export.fresh import FORBIDDEN, NEVER

    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from orchestrator.export.fresh import Refuse\n"
        "sys.meta_path.insert(0, Refuse({'ray', 'torch'}))\n"
        "import torch"
    )
    from pathlib import Path

    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-I", "-c", code, root], capture_output=True, text=True, check=False)
    assert "torch may not be needed" in done.stderr
    assert "torch" in FORBIDDEN["onnx"]
    assert "itpn_core" in FORBIDDEN["pt2"]
    assert "orchestrator" in NEVER


def test_differences_are_relative_to_each_output_and_see_shapes_and_numbers():
    one = {"a": np.ones((2, 2), np.float32), "b": 100 * np.ones(3, np.float32)}
    assert difference(one, one, 1e-4).equal
    assert difference(one, {**one, "b": one["b"] + 0.005}, 1e-4).equal
    gap = difference(one, {**one, "a": one["a"] + 0.005}, 1e-4)
    assert not gap.equal
    assert gap.where == "a"
    assert not difference(one, {"a": one["a"]}, 1e-4).equal
    assert not difference(one, {**one, "b": one["b"][:2]}, 1e-4).equal
    assert not difference(one, {**one, "a": one["a"] * np.nan}, 1e-4).equal


@pytest.mark.parametrize(("wrong", "words"), [
    ({"formats": ("onx",)}, "Did you mean 'onnx'"),
    ({"formats": ()}, "at least one"),
    ({"image_size": (224,)}, "height, width"),
    ({"batch": -1}, "0 .any number"),
    ({"plain": True, "migration": MIGRATION}, "must be false"),
])  # fmt: skip
def test_settings_that_cannot_be_exported_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        ExportConfig(**wrong)


def test_features_average_the_tokens_that_the_classifier_does(tmp_path):
    survivors = TokenMigration(layers=(1,), keep=(0.5,), pool="survivors")
    model = classifier(tmp_path / "weights.pt").eval()
    model.set_token_reduction(migration=survivors)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(model.head(Program(model, "features")(images)), model(images), rtol=1e-6, atol=1e-7)
        model.set_token_reduction(migration=TokenMigration(layers=(1,), keep=(0.5,)))
        everything = model.head(Program(model, "features")(images))
    assert not torch.allclose(everything, model.head.bias.expand_as(everything))


def test_a_size_that_does_not_fit_is_one_sentence(tmp_path, capsys):
    classifier(tmp_path / "weights.pt")
    words = [f"source={tmp_path}/weights.pt", f"dest={tmp_path}/out", "image_size=[225,225]", "num_heads=2"]
    assert run_job(ExportConfig, "", "", lambda config, _: export(config), lambda config: config, words) == 2
    assert "image_size = [225, 225]: does not fit this model" in capsys.readouterr().err


def test_logits_of_weights_without_a_classifier_are_refused(tmp_path, capsys):
    write_run(tmp_path / "run")
    words = [f"source={tmp_path}/run", f"dest={tmp_path}/out", "output=logits"]
    assert run_job(ExportConfig, "", "", lambda config, _: export(config), lambda config: config, words) == 2
    assert "the weights hold no classifier" in capsys.readouterr().err
