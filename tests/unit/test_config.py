"""Recipes and overrides become configurations, and mistakes become one clear sentence."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.errors import SettingError
from orchestrator.config.load import load, to_yaml
from orchestrator.config.schema import flat_values, help_text, leaves


@dataclass(frozen=True)
class Inner:
    rate: float = field(default=0.5, metadata={"help": "how fast"})
    sizes: tuple[int, int, int] = field(default=(1, 1, 6), metadata={"help": "how large"})
    mode: str = field(default="auto", metadata={"help": "which", "choices": "auto,cpu,cuda"})

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate={self.rate}: must not be negative")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner, metadata={"help": "inside"})
    name: str = field(default="", metadata={"help": "called"})
    flag: bool = field(default=False, metadata={"help": "switched", "affects_result": False})


def test_defaults_then_recipe_then_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("inner: {rate: 0.25, sizes: [2, 2, 8]}\nname: from-recipe\n")
    config = load(Outer, recipe, ["name=from-line", "inner.mode=cpu"])
    assert config == Outer(Inner(0.25, (2, 2, 8), "cpu"), "from-line")


@given(st.floats(0, 1e6), st.tuples(*[st.integers(1, 99)] * 3), st.sampled_from(["auto", "cpu"]), st.booleans())
def test_printed_configuration_reads_back_equal(tmp_path_factory, rate, sizes, mode, flag):
    config = Outer(Inner(rate, sizes, mode), "n", flag)
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(to_yaml(config))
    assert load(Outer, path, []) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inner.rte=1"], ["inner.rte", "inner.rate"]),
        (["rate=1"], ["'rate'", "inner.rate"]),
        (["inner.sizes=[1,2]"], ["inner.sizes", "[1, 2]", "tuple"]),
        (["inner.rate=fast"], ["inner.rate", "'fast'", "float"]),
        (["inner.mode=gpu"], ["inner.mode", "'gpu'", "auto, cpu, cuda"]),
        (["inner=3"], ["'inner'", "section", "inner.rate"]),
        (["flag=perhaps"], ["flag", "perhaps", "bool"]),
        (["inner.rate"], ["key.path=value"]),
        (["inner.rate=-1"], ["inner", "rate=-1", "negative"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(words, expected):
    with pytest.raises(SettingError) as error:
        load(Outer, None, words)
    for part in expected:
        assert part in str(error.value)


def test_exponents_are_numbers_and_names_stay_names():
    config = load(Outer, None, ["inner.rate=1e-3", "name=1e5"])
    assert config.inner.rate == 1e-3
    assert config.name == "1e5"


def test_recipe_problems_are_named(tmp_path):
    with pytest.raises(SettingError, match="cannot read recipe"):
        load(Outer, tmp_path / "absent.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("inner: [")
    with pytest.raises(SettingError, match="not valid YAML"):
        load(Outer, broken, [])
    broken.write_text("- a list")
    with pytest.raises(SettingError, match="must be a mapping"):
        load(Outer, broken, [])


def test_help_lists_every_leaf_with_type_default_and_meaning():
    text = help_text(Outer)
    for leaf in leaves(Outer):
        assert leaf.key in text
        assert leaf.help in text
    assert "tuple[int, int, int]" in text
    assert flat_values(Outer())["inner.rate"] == 0.5
    assert [leaf.key for leaf in leaves(Outer) if not leaf.affects_result] == ["flag"]
