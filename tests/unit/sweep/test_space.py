import itertools

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from itpn_core.errors import ConfigError
from orchestrator.config.load import load
from orchestrator.config.schema import leaves
from orchestrator.config.tree import PretrainConfig
from orchestrator.sweep.legal import config_check, with_fields
from orchestrator.sweep.parameter import parse_parameter
from orchestrator.sweep.read_space import parse_space

FIELDS = [leaf.key for leaf in leaves(PretrainConfig)]
REDUCTION = """
drops: {choices: [0, 1, 2]}
model.migration.layers[0]: {low: 1, high: 3, when: {drops: [1, 2]}}
model.migration.keep[0]: {low: 0.5, high: 0.75, step: 0.25, when: {drops: [1, 2]}}
model.migration.layers[1]: {low: 2, high: 4, when: {drops: 2}}
model.migration.keep[1]: {choices: [0.75], when: {drops: 2}}
model.migration.similarity: {choices: [features, keys], when: {drops: [1, 2]}, otherwise: features}
gather: [false, true]
model.gathering.window: {choices: [7, 14], when: {gather: true}, otherwise: 0}
model.gathering.global_layers: {choices: [[], [0, 1]], when: {gather: true}}
"""
ORDER = ["model.migration.layers[0] < model.migration.layers[1]"]


def space(text=REDUCTION, relations=ORDER, **options):
    return parse_space(yaml.safe_load(text), relations, known=FIELDS, **options)


def test_every_setting_of_the_grid_is_legal_distinct_and_counted():
    built = space()
    # drops 0: 1; 1: 3 layers x 2 keeps x 2 similarities; 2: pairs (1,2..4) (2,3..4) (3,4) = 6, x 2 x 1 x 2
    reductions = 1 + 3 * 2 * 2 + 6 * 2 * 2
    windows = 1 + 2 * 2
    found = list(built.grid())
    assert len(found) == len({setting.key for setting in found}) == built.size() == reductions * windows
    assert f"{reductions * windows} settings" in built.describe()
    assert all(built.refusal(setting) == "" for setting in found)
    assert built.size(limit=10) == 11
    assert "more than 10 settings" in built.describe(limit=10)


def test_settings_become_words_that_the_pretraining_job_accepts():
    for setting in itertools.islice(space().grid(), 0, None, 17):
        config = load(PretrainConfig, None, setting.overrides())
        assert config == with_fields(load(PretrainConfig, None, []), setting.fields)
        assert len(config.model.migration.layers) == setting["drops"]
        assert (config.model.gathering.window > 0) == setting["gather"]


def test_parameters_that_do_not_exist_leave_the_recipe_or_their_otherwise():
    off = next(s for s in space().grid() if s["drops"] == 0 and not s["gather"])
    assert set(off) == {"drops", "gather"}
    assert off.fields == {
        "model.migration.similarity": "features",
        "model.gathering.window": 0,
        "model.migration.layers": (),
        "model.migration.keep": (),
    }


@given(st.integers(0, 1000), st.integers(0, 2**40))
def test_draws_are_legal_repeatable_and_survive_a_journal(seed, index):
    built = space()
    setting = built.draw(seed, index)
    assert setting == built.draw(seed, index)
    assert built.refusal(setting) == ""
    again = built.setting(yaml.safe_load(setting.key))
    assert again == setting
    assert hash(again) == hash(setting)
    assert again.overrides() == setting.overrides()


def test_draws_reach_every_setting():
    built = space()
    assert {built.draw(3, index) for index in range(6000)} == set(built.grid())


def test_numbers_are_drawn_in_their_range_and_logarithm():
    built = parse_space(
        {"lr": {"low": "1e-4", "high": 1e-2, "log": True}, "width": {"low": 8, "high": 64, "log": True}}
    )
    assert built.size() is None
    assert "infinitely many" in built.describe()
    drawn = [built.draw(0, index) for index in range(400)]
    assert all(1e-4 <= s["lr"] <= 1e-2 and isinstance(s["width"], int) and 8 <= s["width"] <= 64 for s in drawn)
    assert 0.4 < sum(s["lr"] < 1e-3 for s in drawn) / 400 < 0.6
    assert 0.4 < sum(s["width"] < 23 for s in drawn) / 400 < 0.6
    three = sorted({s["lr"] for s in built.grid(levels=3)})
    assert three == pytest.approx([1e-4, 1e-3, 1e-2])


def test_steps_leave_no_dust():
    values = parse_parameter("x", "keep", {"low": 0.5, "high": 0.9, "step": 0.05}).grid(1)
    assert values == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


@pytest.mark.parametrize(
    ("text", "relations", "message"),
    [
        ("model.migraton.keep[0]: {low: 0, high: 1}", [], r"sweep.space = 'model.migraton.keep\[0\]'.*Did you mean"),
        ("a: {low: 3, high: 1}", [], r"sweep.space.a.low = 3: must be at most high = 1"),
        ("a: {low: 1}", [], r"sweep.space.a = .*high is missing"),
        ("a: {low: 0, high: 1, log: true}", [], r"sweep.space.a.low = 0: must be above 0"),
        ("a: {low: 0, high: 1, step: 2}", [], r"sweep.space.a.step = 2: must lie in 0 to 1"),
        ("a: {low: x, high: 1}", [], r"sweep.space.a.low = 'x': must be a number"),
        ("a: {choices: []}", [], r"sweep.space.a.choices = \[\]: must be a list of at least one value"),
        ("a: [1, 1]", [], r"1 stands there twice"),
        ("a: {choices: [1], low: 2}", [], r"sweep.space.a.low = 2: cannot stand beside choices"),
        ("a: {choises: [1], low: 1}", [], r"a.choises = \[1\]: there is no such word. Did you mean 'choices'"),
        ("a: 3", [], r"sweep.space.a = 3: must be a mapping"),
        ("{}", [], r"sweep.space = \{\}: must be a mapping with at least one parameter"),
        ("a: {choices: [1], when: {b: 1}}", [], r"sweep.space.a.when = 'b': there is no such parameter"),
        ("a: [1, 2]\nb: {choices: [1], when: {a: 3}}", [], r"sweep.space.b.when.a = 3: must be one of 1, 2"),
        ("a: {choices: [1], when: {b: 1}}\nb: {choices: [1], when: {a: 1}}", [], r"depend on each other in a circle"),
        ("a: [1, 2]", ["a < c"], r"sweep.constraints = 'a < c': 'c' is neither a parameter nor a number"),
        ("a: [1, 2]", ["c < a"], r"sweep.constraints = 'c < a': there is no parameter 'c'"),
        ("a: [x, y]", ["a < 2"], r"a is not a number"),
        ("a: [1, 2]", ["a less 2"], r"must read 'parameter < parameter'"),
        ("a: [1, 2]", ["a > 2"], r"none of \d+ random settings is legal .*breaks 'a > 2'"),
        ("a[0]: [1, 2]", [], r"only a configuration field has elements"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_with_its_place(text, relations, message):
    with pytest.raises(ConfigError, match=message):
        space(text, relations)


def test_a_setting_from_elsewhere_is_checked():
    built = space()
    with pytest.raises(ConfigError, match=r"drops = 7: must be one of 0, 1, 2"):
        built.setting({"drops": 7, "gather": False})
    with pytest.raises(ConfigError, match=r"gather = '\(missing\)'"):
        built.setting({"drops": 0})
    with pytest.raises(ConfigError, match=r"window = 7: does not exist here"):
        built.setting({"drops": 0, "gather": False, "model.gathering.window": 7})


def test_what_the_model_refuses_is_no_setting_of_the_space():
    base = load(PretrainConfig, None, ["model.img_size=224", "model.embed_dim=64", "model.depths=[1,1,4]"])
    text = """
    model.migration.layers[0]: {low: 1, high: 6}
    model.migration.keep[0]: {choices: [0.4, 0.5, 0.75]}
    model.gathering.window: [0, 7, 20]
    """
    built = space(text, [], check=config_check(base))
    legal = list(built.grid())
    # layers 4 to 6 do not exist, .4 is below a checkerboard half, a window of 20 is wider than the 14x14 grid
    assert {s["model.migration.layers[0]"] for s in legal} == {1, 2, 3}
    assert {s["model.migration.keep[0]"] for s in legal} <= {0.5, 0.75}
    assert {s["model.gathering.window"] for s in legal} == {0, 7}
    refused = built.setting(
        {"model.migration.layers[0]": 5, "model.migration.keep[0]": 0.5, "model.gathering.window": 0}
    )
    assert "5 must lie in 0 to 3" in built.refusal(refused)
