"""Token reduction around the models: objectives, benchmark, accuracy of rules, picture."""

from __future__ import annotations

import sys

import pytest
import torch

from itpn_core import TokenGathering, TokenMigration
from itpn_core.benchmark import __main__ as command
from itpn_core.benchmark.accuracy import (
    MIGRATION,
    accuracy_table,
    answers,
    at_speed,
    compare_rules,
    features_of,
    joined,
    rules,
    schedule,
    variants,
    variants_table,
)
from itpn_core.benchmark.timing import Spread, interleaved_seconds, peak_bytes, ratios
from itpn_core.benchmark.token_reduction import (
    PLAIN,
    measure_speed,
    measured_ratios,
    pooled_features,
    quality,
    quality_table,
    settings_for,
    speed_table,
)
from itpn_core.benchmark.window_attention import implementations
from itpn_core.errors import ConfigError
from itpn_core.models import ModelConfig, build_backbone
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.tasks import build_task
from itpn_core.reduction.picture import KEPT, observe, overlay
from itpn_core.reduction.plan import make_plan

SMALL = {"embed_dim": 32, "depths": (1, 1, 4), "num_heads": 2, "patch_size": 4, "img_size": 32}
HALF = TokenMigration((2,), (0.5,))


def _model():
    torch.manual_seed(0)
    return build_backbone(ModelConfig(**SMALL)).eval()


def test_the_moving_average_teacher_is_never_reduced():
    config = ModelConfig(**SMALL, migration=HALF, gathering=TokenGathering(4, 2, learn=True))
    task = build_task(config, ObjectiveConfig(kind="ema", pyramid_dim=16)).train()
    averaged = next(m for m in task.modules() if type(m).__name__ == "EmaTeacher").module
    assert task.student.is_reduced
    assert not averaged.is_reduced
    images, keys = torch.rand(3, 3, 32, 32), torch.arange(3)
    task(images, task.targets(images), keys).loss_B.mean().backward()
    assert task.student.gathering_tokens.grad.abs().sum() > 0
    task.ema_update(0.5)


def test_an_objective_refuses_a_schedule_that_must_drop_masked_tokens():
    migration = TokenMigration((1, 2, 3), (0.625, 0.5, 0.5))
    with pytest.raises(ConfigError, match="masked tokens never go"):
        build_task(ModelConfig(**SMALL, migration=migration), ObjectiveConfig(kind="ema", pyramid_dim=16))


@pytest.mark.parametrize("size", [224, 384, 512, 1024])
def test_every_setting_of_the_benchmark_is_legal_at_its_size(size):
    settings = settings_for(size, baselines=True)
    assert next(iter(settings)) == PLAIN
    for migration, gathering in settings.values():
        plan = make_plan(migration, gathering, 24, (size // 16, size // 16))
        assert not plan.order.padded


def test_speed_rows_compare_with_the_unreduced_model():
    settings = {PLAIN: (TokenMigration(), TokenGathering()), "half": (HALF, TokenGathering())}
    model = _model()
    rows = {row.name: row for row in measure_speed(model, settings, torch.randn(2, 3, 32, 32), rounds=3)}
    assert rows[PLAIN].flops == 1.0
    assert rows["half"].flops > 1.1
    assert (rows[PLAIN].speed.low, rows[PLAIN].speed.high) == (1.0, 1.0)
    assert not model.is_reduced
    assert "| half |" in speed_table(list(rows.values()))


def test_rounds_are_interleaved_and_ratios_paired():
    order = []
    calls = {name: (lambda n=name: order.append(n)) for name in ("a", "b")}
    seconds = interleaved_seconds(calls, torch.device("cpu"), rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert [len(v) for v in seconds.values()] == [2, 2]
    paired = ratios({"slow": [2.0, 4.0, 6.0], "fast": [1.0, 4.0, 2.0]}, "slow")
    assert paired["fast"] == Spread(2.0, 1.5, 2.5)


def test_every_window_implementation_computes_the_same():
    results = [call() for call in implementations(64, 4, 2, batch=2, heads=2, device=torch.device("cpu")).values()]
    for result in results[2:]:
        torch.testing.assert_close(result, results[1], atol=1e-5, rtol=1e-5)


def test_peak_memory_counts_what_lives_at_the_same_time():
    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second.exp().sum()

    peak = peak_bytes(call, torch.device("cpu"))
    assert 8000 <= peak < 12000


def test_quality_and_rules_are_measured_on_the_same_images():
    model = _model()
    bank = (torch.randn(40, 3, 32, 32), torch.arange(40) % 4)
    queries = (torch.randn(12, 3, 32, 32), torch.arange(12) % 4)
    settings = {PLAIN: (TokenMigration(), TokenGathering())} | rules(2, 0.5)
    rows = quality(model, settings, bank, queries, batch=16, k=3, rounds=2)
    assert rows[0].name == PLAIN
    assert rows[0].cosine == pytest.approx(1.0)
    assert rows[0].difference.value == 0.0
    assert "paired 95%" in quality_table(rows)
    keeps = (0.5, 0.75)
    seeds = [answers(model, seed, schedule(2, keeps, seed), bank, queries, layer=2, batch=16) for seed in (0, 1)]
    settings = {PLAIN: (TokenMigration(), TokenGathering())} | schedule(2, keeps, 0)
    compared = compare_rules(joined(seeds), measured_ratios(model, settings, queries[0], rounds=2), keeps)
    assert [row.rule for row in compared] == [PLAIN, *rules(2, 0.5), *rules(2, 0.75)]
    assert all(row.found.knn.shape == row.found.probe.shape == (2, 12) for row in compared)
    assert all(row.ahead[0].value == 0.0 for row in compared if row.rule == MIGRATION)
    assert "migration ahead" in accuracy_table(compared)


def test_definitions_of_migration_are_compared_with_the_unreduced_model():
    data = (torch.randn(40, 3, 32, 32), torch.arange(40) % 4)
    wanted = variants(2, 0.5)
    found = answers(_model(), 0, wanted, data, data, layer=2, batch=16)
    assert list(found) == [PLAIN, *wanted]
    assert found[PLAIN].cosine == pytest.approx(1.0)
    assert "| carried, keys, neighbours |" in variants_table(found)


def test_layers_before_the_drop_run_once_and_change_nothing():
    model, images = _model(), torch.randn(5, 3, 32, 32)
    settings = {PLAIN: (TokenMigration(), TokenGathering())} | rules(2, 0.5) | variants(2, 0.5)
    shared = features_of(model, settings, images, 2, 4, torch.float32)
    for name, setting in settings.items():
        if setting[0].rule == "random":
            # its order is drawn from the tokens that enter, here those of a later layer
            continue
        expected, _ = pooled_features(model, setting, images, images, 4)
        torch.testing.assert_close(shared[name], expected, msg=lambda m, n=name: f"{n}: {m}")
    assert not model.is_reduced


def test_a_rule_is_interpolated_to_the_speed_of_another():
    low, high = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    curve = [(1.5, low), (1.0, high)]
    assert at_speed(curve, 1.25).tolist() == [[0.5, 1.0]]
    assert at_speed(curve, 1.0).tolist() == high.tolist()
    # no faster point was measured: its fastest one
    assert at_speed(curve, 9.0).tolist() == low.tolist()


def test_the_picture_says_where_every_token_went():
    model = _model()
    images = torch.rand(2, 3, 32, 48)
    model.set_token_reduction(TokenMigration((1, 3), (0.75, 0.6666)), TokenGathering(4, 2))
    seen = observe(model, images)
    assert seen.dropped.shape == (2, 8, 12)
    assert seen.layers == (1, 3)
    assert seen.window == (4, 4)
    for image in seen.dropped:
        assert [(image == layer).sum().item() for layer in (1, 3, KEPT)] == [24, 24, 48]
        row, col = torch.where(image == 1)
        # the first drop takes colour 0 only
        assert not ((row + col) % 2).any()
    shown = overlay(images, seen)
    assert shown.shape == (2, 32, 48, 3)
    kept = (seen.dropped[0] == KEPT).nonzero()[0].tolist()
    inside = (slice(kept[0] * 4 + 1, kept[0] * 4 + 3), slice(kept[1] * 4 + 1, kept[1] * 4 + 3))
    torch.testing.assert_close(shown[0][inside], images[0].permute(1, 2, 0)[inside])


def test_the_picture_is_drawn(tmp_path):
    from orchestrator.track.reduction_figure import draw_reduction

    model = _model()
    model.set_token_reduction(HALF, TokenGathering(4, 2))
    images = torch.rand(2, 3, 32, 32)
    path = draw_reduction(model, images, images - 0.5, tmp_path / "deep" / "tokens.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_prints_a_table(monkeypatch, capsys):
    options = {"--sizes": "64", "--shape": "tiny", "--rounds": "2", "--batch": "1", "--device": "cpu", "--only": "migr"}
    arguments = [word for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["benchmark", "token_reduction", *arguments])
    command.main()
    printed = capsys.readouterr().out
    assert "64 px, batch 1, 2 rounds" in printed
    assert "| migration and gathering |" in printed
