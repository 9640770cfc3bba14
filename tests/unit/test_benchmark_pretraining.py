"""The pre-training benchmark: the naive step is the same training, and the tables come out on a CPU."""

import argparse
import copy

import pytest
import torch

from itpn_core.benchmark import pretraining
from itpn_core.benchmark.pretraining import TrainingStep
from itpn_core.evaluation.cost import training_flops
from itpn_core.task import Examples

SMALL = ["--width", "64", "--depths", "1,1,2", "--size", "32", "--teacher", "vit_tiny_patch16_224", "--rounds", "2"]
CPU = torch.device("cpu")


def options(*words):
    parser = argparse.ArgumentParser()
    pretraining.add_arguments(parser)
    return parser.parse_args([*SMALL, "--device", "cpu", "--batches", "2", *words])


def examples(batch=2):
    number = torch.arange(batch)
    torch.manual_seed(0)
    return Examples(torch.rand(batch, 3, 32, 32), number * 0, number >= 0, number)


@pytest.mark.parametrize("student", ["fast", "itpn"])
def test_the_naive_step_is_the_same_training(student):
    torch.manual_seed(0)
    task = pretraining._task(student, options(), CPU)
    twin = copy.deepcopy(task)
    ours, naive = (TrainingStep(t, examples(), naive=n) for t, n in ((task, False), (twin, True)))
    for _ in range(3):
        ours()
        naive()
    assert float(ours.loss) == pytest.approx(naive.loss, rel=1e-5)
    for (name, one), other in zip(task.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


def test_flops_of_a_step_do_not_depend_on_the_mode():
    task = pretraining._task("fast", options(), CPU)
    found = training_flops(task, 32, CPU)
    assert task.training
    assert found == training_flops(task.eval(), 32, CPU)
    assert 1e6 < found < 1e9


def test_the_table_comes_out(capsys):
    pretraining.main(options("--students", "fast", "--no-compile"))
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert [row.split("|")[2].strip() for row in rows] == ["naive", "eager"]
    assert "1 [1, 1]" in rows[0], "everything is compared with the naive step"
