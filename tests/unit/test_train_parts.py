"""The small parts of the training engine: batches, schedule, groups, guard, window."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.config.errors import SettingError
from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.launch.check import check
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import resolve
from orchestrator.train.config import OptimizerConfig
from orchestrator.train.optimizer import (
    build_optimizer,
    derived_lines,
    load_optimizer_tensors,
    make_schedule,
    optimizer_tensors,
    parameter_groups,
    peak_lr,
)
from orchestrator.train.step import even_parts, micro_batches
from orchestrator.train.window import Window
from tests.support import tiny_config


@given(st.integers(0, 200), st.integers(1, 20))
def test_even_parts_cover_everything_once(count, parts):
    slices = even_parts(count, parts)
    sizes = [s.stop - s.start for s in slices]
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))
    assert max(sizes) - min(sizes) <= 1
    # The last pass carries the gradient all-reduce: it is empty only when all are.
    assert sizes[-1] == max(sizes)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_every_rank_makes_the_same_number_of_passes(batch, world, micro):
    passes = micro_batches(batch, world, micro)
    shares = {batch * (rank + 1) // world - batch * rank // world for rank in range(world)}
    for share in shares:
        assert len(even_parts(share, passes)) == passes
        assert max(s.stop - s.start for s in even_parts(share, passes)) <= micro


def test_schedule_warms_up_and_ends_low():
    config = OptimizerConfig(lr=1.0, warmup_fraction=0.1, min_lr_ratio=0.01)
    factors = [make_schedule(config, 1, 100, 10).lr(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.011


@given(total=st.integers(1, 500), per_epoch=st.integers(1, 50), steps=st.integers(1, 600), epochs=st.floats(0.1, 9))
def test_warm_up_lasts_as_long_as_was_asked(total, per_epoch, steps, epochs):
    in_steps = make_schedule(OptimizerConfig(lr=1.0, warmup_steps=steps), 1, total, per_epoch)
    in_epochs = make_schedule(OptimizerConfig(lr=1.0, warmup_epochs=epochs), 1, total, per_epoch)
    assert in_steps.warmup == min(steps, total)
    assert in_epochs.warmup == min(round(epochs * per_epoch), total)
    for schedule in (in_steps, in_epochs):
        rates = [schedule.lr(step) for step in range(total)]
        first = next((step for step, rate in enumerate(rates) if rate == 1.0), total)
        assert first == schedule.warmup
        assert all(0 < a < b for a, b in itertools.pairwise(rates[: first + 1]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.optimizer.warmup_steps=5", "train.optimizer.warmup_epochs=1"], "both say how long the warm-up is"),
        (["train.optimizer.warmup_steps=-1"], "warmup_steps=-1: it must be 0 or more"),
        (["train.optimizer.warmup_epochs=.inf"], "warmup_epochs=inf: it must be 0 or more"),
        (["train.teacher_stream=true"], "only objective.kind=fast and clip have a frozen teacher"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, words, told):
    with pytest.raises(SettingError, match=re.escape(told)):
        check(tiny_config("/nowhere", tmp_path, *words))


def test_the_printed_configuration_shows_the_peak_and_loads_again(tmp_path, capsys):
    words = ["--print-config", "train.optimizer.lr_batch=64", "train.optimizer.lr=1e-3", "train.global_batch=256"]
    assert run_job(PretrainConfig, "", "", print, resolve, words, notes=derived_lines) == 0
    printed = capsys.readouterr().out
    assert "# derived: peak learning rate 0.004 (lr 0.001 x global batch 256 / lr_batch 64)" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert load(PretrainConfig, tmp_path / "again.yaml", []).train.global_batch == 256


def test_scaling_rule_is_asked_for():
    assert peak_lr(OptimizerConfig(lr=1e-3), 4096) == 1e-3
    assert peak_lr(OptimizerConfig(lr=1e-3, lr_batch=256), 4096) == pytest.approx(16e-3)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.gamma_1 = nn.Parameter(torch.ones(4))


def test_only_matrices_decay():
    model = Small()
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(weight_decay=0.1), 1e-3)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert decayed == {"linear.weight"}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_layer_decay_scales_the_rate_by_depth():
    config = OptimizerConfig(layer_decay=0.5)
    groups = parameter_groups(Small().named_parameters(), config, 1.0, lambda name: 2 * name.startswith("norm"), 2)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["norm.weight"] == 1.0
    assert rates["linear.weight"] == 0.25


def step(model, optimizer):
    model.linear(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_state_by_name_continues_exactly():
    torch.manual_seed(0)
    config = OptimizerConfig()
    first, second = nn.Module(), nn.Module()
    first.linear, second.linear = nn.Linear(4, 4), nn.Linear(4, 4)
    one = build_optimizer(parameter_groups(first.named_parameters(), config, 1e-2), config)
    step(first, one)
    second.load_state_dict(first.state_dict())
    two = build_optimizer(parameter_groups(second.named_parameters(), config, 1e-2), config)
    load_optimizer_tensors(two, {k: v.clone() for k, v in optimizer_tensors(one).items()})
    step(first, one)
    step(second, two)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="missing"):
        load_optimizer_tensors(two, {"other/step": torch.zeros(())})


def test_found_inf_keeps_weights_and_moments():
    """The guard relies on it: fused AdamW skips the update where `found_inf` is 1."""
    torch.manual_seed(0)
    model = nn.Module()
    model.linear = nn.Linear(4, 4)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), OptimizerConfig(), 1e-2), OptimizerConfig())
    step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    moments = {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    (model.linear(torch.ones(2, 4)).sum() * math.nan).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(v, moments[k]) for k, v in optimizer_tensors(optimizer).items() if not k.endswith("/step"))


def test_window_gives_rows_in_order_and_flags():
    window = Window(("loss", "norm"), 3, torch.device("cpu"), 1)
    for value in (1.0, 2.0):
        window.add({"loss": torch.tensor(value), "norm": torch.tensor(10 * value)})
    assert not window.full
    reading = window.read([True, False])
    assert reading.rows == [{"loss": 1.0, "norm": 10.0}, {"loss": 2.0, "norm": 20.0}]
    assert reading.flags == [True, False]
    window.add({"loss": torch.tensor(3.0), "norm": torch.tensor(0.0)})
    assert window.read([]).rows == [{"loss": 3.0, "norm": 0.0}]
