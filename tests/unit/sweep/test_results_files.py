"""From a journal to the front, tables, pictures and recipes that other jobs accept."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch

from itpn_core.errors import ConfigError
from itpn_core.pretraining.tasks import build_task
from orchestrator.config.load import load
from orchestrator.config.tree import EvaluateConfig, PretrainConfig, SweepJobConfig
from orchestrator.launch.check import _check_settings
from orchestrator.launch.home import resolve
from orchestrator.sweep import page, plot, tables
from orchestrator.sweep.driver import distinct_line
from orchestrator.sweep.importance import importances
from orchestrator.sweep.journal import End
from orchestrator.sweep.known import FAILED, FINISHED, INFEASIBLE, Trial
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.results import BASELINE, build

SPACE = parse_space(
    {"model.migration.layers[0]": {"choices": [1]}, "model.migration.keep[0]": {"low": 0.5, "high": 1.0}}
)
PLAIN = {"scores": {"k-NN": {"top1": [0.80, 0.01], "difference": [0, 0]}}, "gflops": 2.0, "memory_mb": 100.0}


def words(*more):
    shape = ["model.embed_dim=32", "model.num_heads=2", "model.depths=[1,1,2]", "model.patch_size=8"]
    return [*shape, "model.img_size=112", "objective.kind=ema", "objective.pyramid_dim=16", "cluster.device=cpu",
            "objective.target_norm=auto", "evaluate.checkpoint=/some/where", *more]  # fmt: skip


def config(*more):
    return resolve(load(SweepJobConfig, None, words(*more)), {"ITPN_HOME": "/h"})


def end(accuracy, speedup, order, *, error=0.005, spread=0.01, noise=1.0):
    measured = {"accuracy": accuracy, "accuracy_loss": 0.8 - accuracy, "speedup": speedup}
    measured |= {"images_per_second": 100 * speedup, "gflops": 2 / speedup, "memory_mb": 90.0}
    details = {
        "scores": {"k-NN": {"top1": [accuracy, 0.01], "difference": [accuracy - 0.8, error]}},
        "speedup": [speedup, speedup - spread, speedup + spread],
        "images_per_second": [100 * speedup, 99 * speedup, 101 * speedup],
        "plain_images_per_second": [100.0, 99.0, 101.0],
        "noise": [noise, noise, noise],
        "migration": f"keep {accuracy}",
        "gathering": "none",
    }
    return End(FINISHED, measured, details, ended=float(order))


def trial(number):
    values = {"model.migration.layers[0]": 1, "model.migration.keep[0]": 0.5 + 0.02 * number}
    return Trial(number, SPACE.setting(values))


def results(ends, *more):
    return build(config(*more).sweep, {n: trial(n) for n in ends}, ends, PLAIN)


ENDS = {
    0: end(0.79, 1.2, 1), 1: end(0.75, 1.5, 2), 2: end(0.78, 1.1, 3), 3: end(0.70, 1.52, 4),
    4: End(FAILED, error="ValueError: no\nmore", ended=5.0), 5: End(INFEASIBLE, error="out of memory: x", ended=6.0),
}  # fmt: skip


def test_the_front_holds_what_nothing_beats_and_the_unreduced_model_competes():
    found = results(ENDS)
    assert [point.number for point in found.front] == [BASELINE, 0, 1, 3]
    better = results({0: end(0.81, 1.2, 1), 1: end(0.79, 0.9, 2)})
    assert [point.number for point in better.front] == [0]


def test_only_points_whose_intervals_are_apart_count_as_distinct():
    assert [point.number for point in results(ENDS).distinct] == [0, 1, 3]
    close = {0: end(0.79, 1.20, 1), 1: end(0.785, 1.21, 2), 2: end(0.70, 1.5, 3)}
    found = results(close)
    assert [point.number for point in found.front] == [BASELINE, 0, 1, 2]
    assert [point.number for point in found.distinct] == [0, 2]
    assert "3 settings, 2 of them distinct" in distinct_line(found)
    assert "fewer than 5" in distinct_line(found)


def test_an_interval_is_never_narrower_than_the_noise_of_the_machine():
    noisy = {n: end(0.79 - 0.005 * n, 1.2 + 0.1 * n, n, noise=1.2, spread=0.0) for n in range(3)}
    found = results(noisy)
    assert found.noise == pytest.approx(0.2)
    assert found.points[0].low["speedup"] == pytest.approx(1.2 * 0.8)
    assert [point.number for point in found.distinct] == [0]


def test_recommendations_are_the_knee_the_fastest_within_tolerance_and_the_most_accurate():
    found = results(ENDS, "sweep.tolerance=0.015").recommended
    assert {name: point.number for name, point in found.items()} == {"knee": 1, "fastest": 0, "accurate": 0}
    assert "fastest" not in results(ENDS, "sweep.tolerance=0.0").recommended


def test_limits_exclude_and_hypervolume_never_shrinks():
    limited = results(ENDS, "sweep.limits=['accuracy_loss <= 0.06']")
    assert [point.number for point in limited.front] == [BASELINE, 0, 1]
    volume = results(ENDS).volume
    assert len(volume) == len(ENDS)
    assert volume == sorted(volume)
    assert volume[0] == pytest.approx(0.09 * 0.2)


def test_tables_hold_every_point_with_its_interval():
    found = results(ENDS)
    rows = list(csv.DictReader(io.StringIO(tables.points_csv(found.front, found.names))))
    assert [row["trial"] for row in rows] == ["unreduced", "0", "1", "3"]
    assert float(rows[1]["accuracy_low"]) < float(rows[1]["accuracy"]) < float(rows[1]["accuracy_high"])
    assert json.loads(rows[1]["model.migration.keep"]) == [0.5]
    text = tables.front_markdown(found)
    assert "| knee |" in text.replace(" yes | knee |", " | knee |")
    assert tables.failures_text(ENDS).splitlines() == [
        "trial 4: failed: ValueError: no", "trial 5: infeasible: out of memory: x"
    ]  # fmt: skip
    assert tables.trials_line(found) == "4 measured, 1 out of memory, 0 pruned, 1 failed"


def test_recommended_recipes_are_accepted_by_pretrain_and_evaluate(tmp_path):
    whole = config("eval.k=7", "train.epochs=3")
    found = results(ENDS)
    for name in found.recommended:
        path = tmp_path / f"recommended-{name}.yaml"
        path.write_text(tables.recommended_recipe(whole, found, name))
        wanted = found.recommended[name].fields["model.migration.keep"]
        for schema in (PretrainConfig, EvaluateConfig):
            read = resolve(load(schema, path, []), {"ITPN_HOME": "/h"})
            assert read.model.migration.keep == wanted
            assert (read.model.img_size, read.data.image_size, read.eval.k, read.train.epochs) == (112, 112, 7, 3)
        pretrain = resolve(load(PretrainConfig, path, []), {"ITPN_HOME": "/h"})
        _check_settings(pretrain)
        task = build_task(pretrain.model, pretrain.objective)
        assert task.student.migration.keep == wanted
        for word in ("Follows:", "Command:", "Verified:"):
            assert word in path.read_text()


def test_a_recommendation_wins_over_what_the_checkpoints_run_says_of_itself(tmp_path):
    """Also where it equals the defaults of all settings, such as an image size of 224."""
    whole = config("model.img_size=224")
    found = results(ENDS)
    path = tmp_path / "recommended.yaml"
    path.write_text(tables.recommended_recipe(whole, found, "knee"))
    own = {"model.img_size": 64, "model.migration.partners": "neighbours", "model.gathering.window": 2, "eval.k": 3}
    read = resolve(load(EvaluateConfig, path, [], own), {"ITPN_HOME": "/h"})
    assert (read.model.img_size, read.data.image_size, read.eval.k) == (224, 224, whole.eval.k)
    assert read.model.gathering == whole.model.gathering
    assert read.model.migration.partners == whole.model.migration.partners


def test_pictures_and_page_show_what_was_found(tmp_path):
    found = results(ENDS)
    drawn = plot.draw(found, {"accuracy": {"a": 0.7, "b": 0.3}}, "a sweep", tmp_path / "sweep.png")
    assert drawn.stat().st_size > 20_000
    empty = plot.draw(results({}), {}, "nothing yet", tmp_path / "empty.png")
    assert empty.stat().st_size > 5_000
    text = page.page(found, "a <sweep>", [("data", "x & y")])
    assert "a &lt;sweep&gt;" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(re.search(r"id='data'>(.*?)</script>", text, re.DOTALL).group(1).replace("<\\/", "</"))
    assert [point["number"] for point in data["points"]] == [BASELINE, 0, 1, 2, 3]
    assert {point["role"] for point in data["points"]} >= {"knee", "fastest, accurate"}


def test_importance_names_the_parameter_that_decides():
    space = parse_space({"model.a": {"choices": [0, 1]}, "model.b": {"choices": [0, 1, 2]}})
    grid = list(space.grid())
    trials = [Trial(n, setting) for n, setting in enumerate(grid * 4)]
    values = {t.number: {"accuracy": float(t.setting["model.a"]) + 0.01 * (t.number % 5)} for t in trials}
    shares = importances(trials, values, ["accuracy"])["accuracy"]
    assert next(iter(shares)) == "model.a"
    assert shares["model.a"] > 0.8
    assert importances(trials[:4], values, ["accuracy"]) == {}


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("sweep.objectives=[accuracy,spedup]", "speedup"),
        ("sweep.objectives=[accuracy]", "two or more"),
        ("sweep.objectives=[speedup,gflops]", "accuracy must be one"),
        ("sweep.trials=0", "sweep.trials"),
        ("sweep.bank_share=0", "sweep.bank_share"),
        ("sweep.timeout_s=0", "sweep.timeout_s"),
    ],
)
def test_wrong_settings_say_what_is_allowed(word, part):
    with pytest.raises((ConfigError, ValueError), match=re.escape(part)):
        load(SweepJobConfig, None, [word])


def test_results_do_not_depend_on_the_order_of_the_journal():
    backwards = {n: ENDS[n] for n in sorted(ENDS, reverse=True)}
    assert replace(results(ENDS)).front == results(backwards).front
    assert torch.tensor(results(ENDS).volume).equal(torch.tensor(results(backwards).volume))
