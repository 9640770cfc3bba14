"""What a model of learning curves forecasts, and what a setting would add to the front."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.sweep.forecast import Forecast, design, encode
from orchestrator.sweep.front import hypervolume
from orchestrator.sweep.read_space import parse_space
from orchestrator.sweep.worth import MARGIN, expected

LENGTH, NOISE = 16, 0.004
SPACE = parse_space(
    yaml.safe_load("""
drops: [0, 1, 2]
layer: {low: 1, high: 6, when: {drops: [1, 2]}}
lr: {low: 1e-4, high: 1e-2, log: true}
kind: [a, b]
layers: {choices: [[], [0], [0, 1]]}
""")
)


def everything(points):
    return np.ones(points.shape[:-1], dtype=bool)


def truth(points):
    """Value at the end and what is lost to it at the first rung: smooth, and better ends start lower."""
    end = 0.8 - 0.2 * points[:, 0] + 0.1 * points[:, 1] ** 2
    return end, 0.15 - 0.1 * points[:, 0]


def measured(points, rungs, seed=0):
    rng = np.random.default_rng(seed)
    end, lost = truth(points)
    part = np.arange(1, LENGTH + 1) / LENGTH
    shape = (part**-0.5 - 1) / (LENGTH**0.5 - 1)
    return [(e - lo * shape + rng.normal(0, NOISE, LENGTH))[:r] for e, lo, r in zip(end, lost, rungs, strict=True)]


def test_settings_are_points_and_what_does_not_exist_is_in_the_middle():
    without = SPACE.setting({"drops": 0, "lr": 1e-4, "kind": "a", "layers": []})
    some = SPACE.setting({"drops": 2, "layer": 6, "lr": 1e-3, "kind": "b", "layers": [0]})
    points = encode(SPACE, [without, some])
    assert points[0].tolist() == pytest.approx([-0.5, 0, 0, -0.5, 0.5, 0.7, 0, 0])
    assert points[1].tolist() == pytest.approx([0.5, 0.5, 0.5, 0, -0.5, 0, 0.7, 0])


def test_trials_that_rest_and_a_few_that_finished_tell_how_others_end():
    rng = np.random.default_rng(1)
    known, other = rng.uniform(-0.5, 0.5, (40, 4)), rng.uniform(-0.5, 0.5, (60, 4))
    rungs = [LENGTH] * 8 + [2] * 32
    mean, deviation = Forecast(known, measured(known, rungs), LENGTH).ends(other)
    end, _ = truth(other)
    assert np.sqrt(np.mean((mean - end) ** 2)) < 0.2 * end.std()
    # not much surer than it may be
    assert np.sqrt(np.mean(((mean - end) / deviation) ** 2)) < 2
    # without those that rest it knows less
    few_mean, few_deviation = Forecast(known[:8], measured(known, rungs)[:8], LENGTH).ends(other)
    assert np.mean((few_mean - end) ** 2) > np.mean((mean - end) ** 2)
    assert few_deviation.mean() > deviation.mean()


def test_a_forecast_is_a_function_of_the_data():
    points = np.random.default_rng(2).uniform(-0.5, 0.5, (12, 3))
    curves = measured(points, [LENGTH] * 4 + [2] * 8)
    first, again = (Forecast(points, curves, LENGTH).ends(points) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("curves", [[np.array([0.3])], [np.zeros(2)] * 4, [np.array([1.0]), np.array([1.0, 5.0])]])
def test_hardly_any_data_is_no_reason_to_fail(curves):
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (len(curves), 5))
    for length in (2, 3, 16):
        mean, deviation = Forecast(points, curves, length).ends(points)
        assert np.isfinite(mean).all()
        assert (deviation > 0).all()


@pytest.mark.parametrize("logs", [60.0, 400.0, 800.0])
def test_a_step_too_far_is_no_reason_to_fail(logs):
    points = np.random.default_rng(3).uniform(-0.5, 0.5, (30, 3))
    forecast = Forecast(points, measured(points, [LENGTH] * 10 + [2] * 20), LENGTH)
    far = np.append(np.full(len(forecast._prior) - 1, logs), -logs)
    with np.errstate(over="ignore", invalid="ignore"):
        loss, gradient = forecast._loss(far)
    assert loss > forecast._loss(forecast._prior)[0]
    assert np.isfinite(gradient).all()


def test_values_without_noise_are_met():
    points = np.random.default_rng(4).uniform(-0.5, 0.5, (60, 3))
    curves = [np.full(1, 3 - 2 * point[0] + point[1]) for point in points]
    mean, deviation = Forecast(points, curves, LENGTH).ends(points)
    assert mean == pytest.approx(np.concatenate(curves), abs=0.02)
    assert np.isfinite(deviation).all()


def test_the_end_is_where_nothing_is_left_to_gain():
    for length in (1, 2, 5, 16):
        assert design(length)[-1].tolist() == [1, 0, 0]
        assert design(length).shape == (length, 3)
    assert design(16)[0].tolist() == [1, 1, 1]


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(0, 10_000))
def test_what_is_sure_is_worth_the_hypervolume_that_it_adds(goals, seed):
    rng = np.random.default_rng(seed)
    held, new = rng.uniform(0, 1, (4, goals)), rng.uniform(0, 1, (6, goals))
    found = expected(new, np.full_like(new, 1e-9), held, goals, everything)
    both = np.vstack([new, held])
    best = both[[i for i, p in enumerate(both) if not any((q >= p).all() and (q > p).any() for q in both)]]
    width = np.maximum(np.ptp(best, axis=0), 1e-9)
    reference = best.min(0) - MARGIN * width
    if goals > 1 and np.ptp(best, axis=0).min() > 0.05:
        before = hypervolume(held, reference)
        added = [(hypervolume(np.vstack([held, p]), reference) - before) / width.prod() for p in new]
        # the directions are a sample: exact in the order of things, not in the last digit
        scale = {2: 4 / np.pi, 3: 6 / np.pi}[goals]
        assert found == pytest.approx(scale * np.array(added), abs=0.12)
    assert ((found > 1e-12) <= [not any((q >= p).all() for q in held) for p in new]).all()


def test_the_uncertain_are_worth_a_look_and_the_forbidden_nothing():
    held = np.array([[1.0, 0.0], [0.6, 0.6], [0.0, 1.0]])
    mean, sure, unsure = np.array([[0.5, 0.5]] * 2), [1e-9, 1e-9], [0.3, 0.3]
    some = expected(mean, np.array([sure, unsure]), held, 2, everything)
    assert some[1] > some[0] == 0
    assert not expected(mean, np.array([sure, unsure]), held, 2, lambda p: p[..., 0] > 9).any()
