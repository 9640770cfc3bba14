"""`jobs/evaluate.py`: every kind of checkpoint, under reduction, beside itself unreduced."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itpn_core.evaluation import over_seeds, paired_difference
from itpn_core.models import Backbone, ModelConfig, export_checkpoint
from itpn_core.reduction import TokenGathering, TokenMigration
from orchestrator.checkpoint.source import open_source
from orchestrator.config.identity import result_fields
from orchestrator.config.tree import EvaluateConfig
from orchestrator.data.store import StoreConfig
from orchestrator.evaluate.choice import checkpoint_settings
from orchestrator.evaluate.job import evaluate
from orchestrator.evaluate.quality import Labelled, Protocol, answers, compare, probe_rates
from orchestrator.evaluate.subject import AGAIN, OFF, PLAIN, Subject, flops_of
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.launch.record import open_record
from orchestrator.train.loop import train
from tests.support import LocalRun, tiny_config, write_shards

SHORT = {"--checkpoint": "evaluate.checkpoint", "--knn": "evaluate.knn", "--json": "evaluate.json"}
HALF = ["model.migration.layers=[1]", "model.migration.keep=[0.5]"]
FAST = ["eval.bank=24", "eval.queries=8", "eval.k=3", "eval.batch=8", "cluster.device=cpu", "evaluate.batch=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of ours: (its config, its folder)."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_config(write_shards(root), root / "runs", "train.max_steps=2", "train.optimizer.average_decay=0.5")
    run = LocalRun(config)
    open_record(run.folder, result_fields(config, "any"), "tiny").next_attempt().save(run.folder)
    train(config, run)
    return config, Path(config.run.storage) / "tiny"


def job(*words):
    return run_job(EvaluateConfig, "", "", evaluate, resolve, list(words), short=SHORT, base=checkpoint_settings)


def test_the_unreduced_features_are_those_of_the_exported_weights(trained):
    config, folder = trained
    source = open_source(str(folder), StoreConfig())
    assert source.kind == "run"
    assert source.place.endswith("final/backbone.safetensors")
    assert source.model == config.model
    exported = load_file(folder / "final" / "backbone.safetensors")
    built = source.headless().state_dict()
    assert all(torch.equal(built[name], exported[name]) for name in built)


def test_a_checkpoint_gives_the_averaged_weights_that_are_exported(trained, tmp_path):
    _, folder = trained
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    source = open_source(str(tmp_path), StoreConfig())
    assert "checkpoints/step-00000002" in source.place
    exported, built = load_file(folder / "final" / "backbone.safetensors"), source.headless().state_dict()
    assert all(torch.equal(built[name], exported[name]) for name in built)


def test_the_job_compares_a_setting_with_the_unreduced_model(trained, tmp_path, capsys):
    config, folder = trained
    out = tmp_path / "out" / "figures.json"
    words = [*FAST, f"data.source={config.data.source}", "data.image_size=48", "track.follow=false"]
    assert job("--checkpoint", str(folder), "--json", str(out), *words, *HALF) == 0
    printed = capsys.readouterr().out
    assert "6x6, positions resampled from 2x2" in printed
    body = json.loads(out.read_text())
    assert list(body["settings"]) == [PLAIN, "given", AGAIN]
    plain, given = body["settings"][PLAIN], body["settings"]["given"]
    assert given["migration"]["keep"] == [0.5]
    assert given["flops_per_image"] < plain["flops_per_image"] == body["settings"][AGAIN]["flops_per_image"]
    assert set(given["accuracy"]) == {"k-NN", "linear probe"}
    assert plain["accuracy"]["k-NN"]["minus_unreduced"]["value"] == 0
    for name in (PLAIN, "given", AGAIN):
        assert f"| {name} |" in printed
    assert out.with_suffix(".png").stat().st_size > 5_000
    assert "none is dropped" not in printed
    small = ["evaluate.rounds=0", "--knn", "--checkpoint", str(folder), *words, "data.image_size=16", *HALF]
    assert job(*small) == 0
    assert "note: of 2x2 tokens none is dropped before layer" in capsys.readouterr().out


def test_the_run_s_own_protocol_is_the_default_and_words_override_it(trained, tmp_path):
    config, folder = trained
    seen = []
    words = ["--checkpoint", str(folder), "eval.k=5"]

    def keep(found, _recipe):
        seen.append(found)
        return 0

    assert run_job(EvaluateConfig, "", "", keep, resolve, words, short=SHORT, base=checkpoint_settings) == 0
    (found,) = seen
    assert found.model == config.model
    assert (found.eval.bank, found.eval.k) == (16, 5)
    assert found.data.image_size == config.model.img_size


def test_published_files_go_through_the_importer(tmp_path):
    torch.manual_seed(0)
    model = Backbone(
        ModelConfig(embed_dim=64, depths=(1, 1, 2), patch_size=8, img_size=16), num_classes=3, final_norm="pooled"
    )
    export_checkpoint(model, tmp_path / "published.pth")
    source = open_source(str(tmp_path / "published.pth"), StoreConfig())
    assert source.kind == "published"
    images = torch.rand(2, 3, 16, 16)
    wanted = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(source.headless()(images), wanted)


def test_mistakes_are_one_sentence(trained, tmp_path, capsys):
    config, folder = trained
    data = f"data.source={config.data.source}"
    cases = {
        (): "evaluate.checkpoint is empty",
        ("--checkpoint", str(tmp_path)): "no weights there; looked for final/backbone.safetensors",
        ("--checkpoint", str(tmp_path / "none")): "no such file or directory",
        ("--checkpoint", str(folder), data, "model.embed_dim=64"): "model.embed_dim=64 (checkpoint: 32)",
        ("--checkpoint", str(folder), data, *FAST, "data.image_size=20"): "20",
        (
            "--checkpoint",
            str(folder),
            data,
            *FAST,
            "model.migration.layers=[9]",
            "model.migration.keep=[0.5]",
        ): "layers",
        ("--checkpoint", str(folder), "evaluate.rounds=1"): "evaluate.rounds",
        ("--checkpoint", str(folder), data, "eval.bank=9999"): "eval.bank=9999",
    }
    for words, part in cases.items():
        assert job(*words) == 2, words
        error = capsys.readouterr().err
        assert part in error, (words, error)
        assert error.startswith("error: ")


def test_costs_need_no_second_model_and_leave_settings_off():
    torch.manual_seed(0)
    model = Backbone(ModelConfig(embed_dim=64, depths=(1, 1, 3), patch_size=8, img_size=16))
    subject = Subject(model, 64, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), None)
    half = (TokenMigration((1,), (0.5,)), OFF[1])
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    costs = subject.costs({PLAIN: OFF, "half": half, AGAIN: OFF}, images, rounds=2, warmup=0)
    assert costs["half"].flops < costs[PLAIN].flops == costs[AGAIN].flops
    assert costs["half"].peak_bytes <= costs[PLAIN].peak_bytes
    assert not subject.model.is_reduced


def test_operations_are_counted_without_the_checkpoint_s_own_reduction():
    """Its window does not fit the smaller grid, and was switched off."""
    config = ModelConfig(embed_dim=32, depths=(1, 1, 2), num_heads=2, img_size=224, gathering=TokenGathering(window=14))
    assert flops_of(config, 128, OFF) > 0


def test_compared_settings_share_the_rates_that_the_unreduced_model_chose():
    torch.manual_seed(0)
    centres, labels = torch.randn(3, 8), torch.arange(120) % 3
    near, far = (centres[labels] + noise * torch.randn(120, 8) for noise in (0.5, 3.0))
    plain, other = Labelled(near, labels, near, labels, 3), Labelled(far, labels, far, labels, 3)
    wanted = Protocol(knn=False, linear=True, rates=(1e-5, 0.1), seeds=2, bank_share=0.5)
    rates = probe_rates(plain, wanted)
    assert len(rates) == 2
    assert set(rates) <= {1e-5, 0.1}
    assert probe_rates(plain, replace(wanted, linear=False)) == ()
    mine = answers(other, replace(wanted, chosen=rates))["linear probe"]
    alone = {rate: answers(other, replace(wanted, rates=(rate,)))["linear probe"] for rate in wanted.rates}
    assert all(torch.equal(mine[seed], alone[rate][seed]) for seed, rate in enumerate(rates))
    assert not torch.equal(alone[1e-5], alone[0.1])


def test_seeds_share_the_queries_and_add_their_own_spread():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 8), torch.arange(60) % 3
    data = Labelled(features, labels, features[:30] + 0.1, labels[:30], 3)
    right = answers(data, Protocol(k=1, seeds=3, bank_share=0.5))["k-NN"]
    assert right.shape == (3, 30)
    assert not torch.equal(right[0], right[1])
    again = answers(data, Protocol(k=1, seeds=3, bank_share=0.5))["k-NN"]
    assert torch.equal(right, again)
    score = compare({"k-NN": right}, {"k-NN": right})["k-NN"]
    assert score.difference.value == score.difference.standard_error == 0
    one = over_seeds(right[:1].double() - 1)
    pairs = paired_difference(right[0], torch.ones(30, dtype=torch.bool))
    assert (one.value, one.standard_error) == pytest.approx((pairs.value, pairs.standard_error))
    assert over_seeds(right.double()).standard_error > over_seeds(right.double().mean(0, keepdim=True)).standard_error
